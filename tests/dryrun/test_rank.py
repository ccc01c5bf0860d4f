"""The dry run and the closed form name the same bytes under every layout; real tensors are no larger."""

import pytest

from llada_megatron.config import rules
from llada_megatron.plan import exact
from tests.distributed import run_ranks
from tests.dryrun.comparing import all_comparisons, assert_same, comparisons, dry_configuration

NOISY = ["model.expert_balance_clean_half=false"]
DENSE = ["model.experts=0", "model.dense_layers=3"]
BDLM, MDLM = 0, 2
FIRST = 0


def objective(name: str) -> list[str]:
    """One stage of an objective on conversations."""
    stage = f"{{name: {name}, block_size: '8', tokens: 4096, objective: {name}}}"
    return ["diffusion=sft", "data.pad_to=8", f"schedule.stages=[{stage}]"]


GROUPS = [*objective("multi_block"), "diffusion.complementary=false"]
EDITING, OPUT = objective("editing"), [*objective("oput"), "diffusion.oput.turns=2"]
POOLS = ["model.expert_capacity=4"]
SOFTMAX = [
    *("model.expert_score=softmax", "model.expert_bias=false", "model.shared_expert_hidden_size=0"),
    *("model.expert_groups=1", "model.expert_groups_per_token=1", "model.dense_layers=0"),
]
MLA = [
    *("model.heads=4", "model.kv_heads=4", "model.head_dim=64", "model.rotary_fraction=1"),
    "model.mla={q_lora_rank: 64, kv_lora_rank: 64, qk_nope_head_dim: 48, qk_rope_head_dim: 16,"
    " v_head_dim: 32}",
]
CAP, DPO = objective("confidence"), [*objective("preference"), "layout.micro_batch=2"]
LEVENSHTEIN = [
    *objective("levenshtein"),
    *("levenshtein.delete_token_id=300", "levenshtein.split_token_id=301"),
]
PP2 = ["layout.processes=2", "layout.pp=2", "layout.pipeline=[2,1]"]
GROUPS_OF_EXPERTS = ["model.expert_groups=4", "model.expert_groups_per_token=2"]
UP = ["layout.recompute=selective", "layout.recompute_modules=[mla_up_proj]"]
OVERLAPPED = ["layout.overlap_experts=true", "layout.ep=2"]
CASES: dict[str, tuple[int, list[str]]] = {
    "mdlm": (MDLM, []),
    "tp_ep": (BDLM, ["layout.processes=4", "layout.tp=2", "layout.ep=2", "training.ema_decay=0.9"]),
    "ep_allgather": (BDLM, ["layout.processes=2", "layout.ep=2", "layout.dispatcher=allgather"]),
    "cp": (BDLM, ["layout.processes=2", "layout.cp=2"]),
    "pp": (BDLM, PP2),
    "full_recompute": (BDLM, ["layout.recompute=full"]),
    "dense": (MDLM, [*DENSE, "layout.processes=2", "layout.tp=2"]),
    "clean_rows_end_tp": (BDLM, [*DENSE, "layout.processes=2", "layout.tp=2"]),
    "cap": (FIRST, [*CAP, "layout.micro_batch=2", "layout.global_batch=2"]),
    "cap_counts_first": (FIRST, CAP),
    "dpo": (FIRST, DPO),
    "oput": (FIRST, [*OPUT, *PP2]),
    "multi_block": (FIRST, [*GROUPS, "layout.processes=2", "layout.cp=2"]),
    "overlap_experts": (BDLM, [*OVERLAPPED, "layout.processes=2"]),
}
SLOW_CASES = (
    "large_vocabulary",
    "vpp",
    "all_axes",
    "overlap",
    "recompute_others",
    "allgather_tp_etp",
    "tied",
    "hybrid_pp",
    "cap_pp",
    "cap_chunked_tp",
    "levenshtein_cp",
    "dpo_cp",
    "editing",
    "pools_tp_cp",
    "oput_tp_chunked",
    "bf16_sums_and_moments",
    "softmax_qkv_bias_tp_ep",
    "latents_tp_cp_pp",
    "latents_up_tp_ep",
    "overlap_experts_vpp",
    "overlap_experts_tp_etp",
    "overlap_shared_experts_tp",
    "clean_rows_end_all_axes",
    "clean_rows_end_recompute",
)
MORE_CASES: dict[str, tuple[int, list[str]]] = {
    "bdlm": (BDLM, []),
    "chunked_head": (BDLM, ["model.head_chunk_tokens=8"]),
    "large_vocabulary": (BDLM, ["model.vocab_size=16384", "model.head_chunk_tokens=8"]),
    "fp32": (BDLM, ["precision=fp32"]),
    "micro_batch": (MDLM, ["layout.micro_batch=2"]),
    "tp": (MDLM, ["layout.processes=2", "layout.tp=2"]),
    "ep": (BDLM, ["layout.processes=4", "layout.ep=4", "layout.micro_batch=2"]),
    "etp": (BDLM, ["layout.processes=2", "layout.tp=2", "layout.etp=2"]),
    "ep_etp": (BDLM, ["layout.processes=4", "layout.tp=2", "layout.ep=2", "layout.etp=2"]),
    "cp_mdlm": (MDLM, ["layout.processes=2", "layout.cp=2"]),
    "pp3": (BDLM, ["layout.processes=3", "layout.pp=3", "layout.global_batch=18", "model.layers=6"]),
    "vpp": (BDLM, ["layout.processes=4", "layout.pp=2", "layout.vpp=2", "model.layers=4"]),
    "vpp_mdlm": (MDLM, ["layout.processes=2", "layout.pp=2", "layout.vpp=2", "model.layers=8"]),
    "all_axes": (
        BDLM,
        ["layout.processes=8", "layout.tp=2", "layout.cp=2", "layout.pp=2", "layout.ep=4", "model.layers=4"],
    ),
    "overlap": (
        BDLM,
        [
            "layout.processes=2",
            "layout.ep=2",
            "layout.overlap_grad_reduce=true",
            "layout.overlap_param_gather=true",
        ],
    ),
    "full_recompute_pp": (
        BDLM,
        ["layout.recompute=full", "layout.processes=2", "layout.pp=2", "model.layers=4"],
    ),
    "recompute_moe": (BDLM, ["layout.recompute=selective", "layout.recompute_modules=[moe]"]),
    "recompute_others": (
        BDLM,
        ["layout.recompute=selective", "layout.recompute_modules=[core_attn,mlp,shared_experts]"],
    ),
    "recompute_dense": (MDLM, [*DENSE, "layout.recompute=full"]),
    "allgather_one": (BDLM, ["layout.dispatcher=allgather"]),
    "allgather_tp_ep": (
        BDLM,
        ["layout.dispatcher=allgather", "layout.processes=4", "layout.tp=2", "layout.ep=4"],
    ),
    "allgather_tp_etp": (
        MDLM,
        ["layout.dispatcher=allgather", "layout.processes=2", "layout.tp=2", "layout.etp=2"],
    ),
    "allgather_recompute": (
        BDLM,
        [
            *("layout.dispatcher=allgather", "layout.processes=2", "layout.ep=2"),
            *("layout.recompute=selective", "layout.recompute_modules=[moe]"),
        ],
    ),
    "yarn": (
        BDLM,
        [f"model.rotary_scaling.{term}" for term in ("type=yarn", "factor=4", "original_positions=64")],
    ),
    "tied": (
        MDLM,
        [
            *("model.tied_head=true", "layout.processes=2", "layout.pp=2"),
            *("model.experts=0", "model.dense_layers=4", "model.layers=4"),
        ],
    ),
    "hybrid_pp": (
        BDLM,
        [
            *("model.core=hybrid", *PP2),
            *("layout.recompute=selective", "layout.recompute_modules=[core_attn,mlp]"),
        ],
    ),
    "hybrid_full_recompute": (BDLM, ["model.core=hybrid", "layout.recompute=full"]),
    "cap_pp": (FIRST, [*CAP, *PP2]),
    "cap_vpp": (FIRST, [*CAP, "layout.processes=2", "layout.pp=2", "layout.vpp=2", "model.layers=4"]),
    "cap_tp": (FIRST, [*CAP, "layout.processes=2", "layout.tp=2"]),
    "cap_chunked_tp": (
        FIRST,
        [
            *CAP,
            *("layout.processes=2", "layout.tp=2", "model.vocab_size=16384", "model.head_chunk_tokens=8"),
        ],
    ),
    "cap_large_vocabulary": (FIRST, [*CAP, "model.vocab_size=16384"]),
    "editing": (FIRST, EDITING),
    "editing_masks_alone": (FIRST, [*EDITING, "diffusion.editing.kept_weight=0"]),
    "oput_cp": (FIRST, [*OPUT, "layout.processes=2", "layout.cp=2"]),
    "oput_tp_chunked": (FIRST, [*OPUT, "layout.processes=2", "layout.tp=2", "model.head_chunk_tokens=8"]),
    "dpo_pp": (FIRST, [*DPO, *PP2]),
    "dpo_cp": (FIRST, [*DPO, "layout.processes=2", "layout.cp=2"]),
    "levenshtein": (FIRST, LEVENSHTEIN),
    "levenshtein_cp": (FIRST, [*LEVENSHTEIN, "layout.processes=2", "layout.cp=2"]),
    "levenshtein_chunked_tp": (
        FIRST,
        [*LEVENSHTEIN, "layout.processes=2", "layout.tp=2", "model.head_chunk_tokens=8"],
    ),
    "pools_tp_cp": (BDLM, [*POOLS, "layout.processes=4", "layout.tp=2", "layout.cp=2", "layout.ep=2"]),
    "pools_recompute": (
        BDLM,
        [*POOLS, "layout.recompute=selective", "layout.recompute_modules=[moe]", "layout.micro_batch=2"],
    ),
    "pools_full_recompute_pp": (
        BDLM,
        [*POOLS, "layout.recompute=full", "layout.processes=2", "layout.pp=2", "model.layers=4"],
    ),
    "softmax": (BDLM, SOFTMAX),
    "softmax_over_all": (BDLM, [*SOFTMAX, "model.normalize_expert_weights=false"]),
    "softmax_over_all_in_groups": (
        BDLM,
        [*SOFTMAX, "model.normalize_expert_weights=false", *GROUPS_OF_EXPERTS],
    ),
    "softmax_allgather": (BDLM, [*SOFTMAX, "layout.dispatcher=allgather"]),
    "softmax_over_all_allgather": (
        BDLM,
        [*SOFTMAX, "model.normalize_expert_weights=false", "layout.dispatcher=allgather"],
    ),
    "softmax_qkv_bias_tp_ep": (
        BDLM,
        [*SOFTMAX, "model.qkv_bias=true", "layout.processes=4", "layout.tp=2", "layout.ep=2"],
    ),
    "latents_tp_cp_pp": (
        BDLM,
        [
            *(*MLA, "model.layers=4", "layout.processes=8", "layout.tp=2", "layout.cp=2", "layout.pp=2"),
            "layout.ep=4",
        ],
    ),
    "latents_up_tp_ep": (BDLM, [*MLA, *UP, "layout.processes=4", "layout.tp=2", "layout.ep=2"]),
    "latents_up_cp_pp": (BDLM, [*MLA, *UP, *PP2, "layout.processes=4", "layout.cp=2"]),
    "latents_up_core": (BDLM, [*MLA, UP[0], "layout.recompute_modules=[core_attn,mla_up_proj]"]),
    "latents_up_core_cp": (
        BDLM,
        [
            *(*MLA, UP[0], "layout.recompute_modules=[core_attn,mla_up_proj]"),
            *("layout.processes=2", "layout.cp=2"),
        ],
    ),
    "latents_up_overlap_tp_vpp": (
        BDLM,
        [
            *(*MLA, *UP, *OVERLAPPED, "layout.processes=4", "layout.tp=2", "layout.pp=2", "layout.vpp=2"),
            "model.layers=4",
        ],
    ),
    "latents_up_full_queries_tp": (
        MDLM,
        [
            *(*MLA, *UP, "model.mla.q_lora_rank=0", "model.layers=4"),
            *("layout.processes=2", "layout.tp=2", "layout.micro_batch=2"),
        ],
    ),
    "latents_hybrid_pp": (BDLM, [*MLA, "model.core=hybrid", *PP2]),
    "latents_core": (BDLM, [*MLA, "layout.recompute=selective"]),
    "latents_full_recompute": (BDLM, [*MLA, "layout.recompute=full"]),
    "latents_mdlm": (MDLM, [*MLA, "layout.micro_batch=2"]),
    "no_expert_bias": (BDLM, ["model.expert_bias=false", "model.experts=16"]),
    "dense_qkv_bias": (MDLM, [*DENSE, "model.qkv_bias=true", "model.qk_norm=false"]),
    "pools_mdlm": (MDLM, [*POOLS, "layout.processes=2", "layout.cp=2"]),
    "bf16_sums_and_moments": (
        BDLM,
        [
            *("precision.gradients=bf16", "precision.moments=bf16"),
            *("layout.processes=4", "layout.tp=2", "layout.ep=2"),
        ],
    ),
    "overlap_experts_vpp": (
        BDLM,
        [*OVERLAPPED, "layout.processes=4", "layout.pp=2", "layout.vpp=2", "model.layers=8"],
    ),
    "overlap_experts_empty_stage": (
        BDLM,
        [
            *(*OVERLAPPED, "layout.processes=4", "layout.pp=2", "layout.vpp=2", "model.layers=4"),
            "layout.pipeline=[2,1,1,0]",
        ],
    ),
    "overlap_experts_tp_etp": (BDLM, [*OVERLAPPED, "layout.processes=4", "layout.tp=2", "layout.etp=2"]),
    "overlap_experts_one_each": (BDLM, [*OVERLAPPED, "layout.processes=8", "layout.ep=8"]),
    "overlap_experts_cp": (BDLM, [*OVERLAPPED, "layout.processes=2", "layout.cp=2"]),
    "overlap_experts_recompute": (
        MDLM,
        [
            *(*OVERLAPPED, "layout.processes=2", "layout.micro_batch=2", "model.head_chunk_tokens=8"),
            *("layout.recompute=selective", "layout.recompute_modules=[core_attn,shared_experts]"),
        ],
    ),
    "overlap_shared_experts": (
        BDLM,
        ["layout.overlap_shared_experts=true", "layout.processes=2", "layout.ep=2"],
    ),
    "overlap_shared_experts_tp": (
        BDLM,
        ["layout.overlap_shared_experts=true", "layout.processes=4", "layout.tp=2", "layout.ep=2"],
    ),
    "overlap_experts_cap": (FIRST, [*CAP, *OVERLAPPED, "layout.processes=2"]),
    "overlap_experts_levenshtein": (FIRST, [*LEVENSHTEIN, *OVERLAPPED, "layout.processes=2"]),
    "overlap_experts_editing": (FIRST, [*EDITING, *OVERLAPPED, "layout.processes=2"]),
    "overlap_experts_oput": (FIRST, [*OPUT, *OVERLAPPED, "layout.processes=2"]),
    "clean_rows_end_all_axes": (
        BDLM,
        [
            *NOISY,
            *("layout.processes=8", "layout.tp=2", "layout.cp=2", "layout.pp=2", "layout.ep=4"),
            "model.layers=4",
        ],
    ),
    "clean_half_uncounted_recompute_tp_cp": (
        BDLM,
        [
            *(*NOISY, "layout.recompute=selective", "layout.recompute_modules=[moe]", "layout.micro_batch=2"),
            *("layout.processes=4", "layout.tp=2", "layout.cp=2", "layout.ep=2"),
        ],
    ),
    "clean_half_uncounted_full_recompute_pp": (
        BDLM,
        [*NOISY, "layout.recompute=full", "layout.processes=2", "layout.pp=2", "model.layers=4"],
    ),
    "clean_rows_end_recompute": (BDLM, [*DENSE, "layout.recompute=full"]),
    "clean_rows_end_core_attn_mlp": (
        BDLM,
        [*DENSE, "layout.recompute=selective", "layout.recompute_modules=[core_attn,mlp]"],
    ),
    "clean_rows_end_vpp": (
        BDLM,
        [*NOISY, "layout.processes=4", "layout.pp=2", "layout.vpp=2", "model.layers=4"],
    ),
    "clean_rows_end_allgather": (
        BDLM,
        [*NOISY, "layout.processes=2", "layout.ep=2", "layout.dispatcher=allgather"],
    ),
    "clean_rows_end_cap_pp": (FIRST, [*CAP, *NOISY, *PP2]),
    "clean_rows_end_oput_tp": (FIRST, [*OPUT, *NOISY, "layout.processes=2", "layout.tp=2"]),
    "dpo_chunked": (FIRST, [*DPO, "model.head_chunk_tokens=8"]),
}


PEAKS_OF_ATTENTION = dict.fromkeys(("latents_up_core_cp", "latents_up_overlap_tp_vpp"), 0.03)
"""Whose peak is a backward of attention, and how near the plan is."""


@pytest.fixture(scope="module")
def found() -> dict[str, list[exact.RankComparison]]:
    return run_ranks(all_comparisons, CASES)[0]


@pytest.fixture(scope="module")
def found_in_slow_cases() -> dict[str, list[exact.RankComparison]]:
    return run_ranks(all_comparisons, {name: MORE_CASES[name] for name in SLOW_CASES})[0]


@pytest.fixture(scope="module")
def found_in_the_rest() -> dict[str, list[exact.RankComparison]]:
    return run_ranks(all_comparisons, {n: c for n, c in MORE_CASES.items() if n not in SLOW_CASES})[0]


@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_is_the_dry_run_to_the_byte_and_its_peak_within_5_percent(found, name: str) -> None:
    for one in found[name]:
        assert_same(one)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_CASES)
def test_the_closed_form_is_the_dry_run_to_the_byte_with_several_axes(found_in_slow_cases, name: str) -> None:
    for one in found_in_slow_cases[name]:
        assert_same(one)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in MORE_CASES if name not in SLOW_CASES])
def test_the_closed_form_is_the_dry_run_to_the_byte_under_every_other_layout(
    found_in_the_rest, name: str
) -> None:
    for one in found_in_the_rest[name]:
        assert_same(one, within=PEAKS_OF_ATTENTION.get(name, 0.05))


def test_what_is_alive_at_the_peak_and_over_time_adds_up_to_the_peak(found) -> None:
    for one in found["pp"]:
        report = one.report
        made = sum(size for _, _, size in report["peak_origins"])
        assert made <= report["peak"] - one.static_found
        assert max(report["over_time"]) == report["peak"]
        assert {phase for phase, _, _ in report["peak_origins"]} <= {"forward", "backward", "step", "loss"}


# Real tensors


def real_and_fake(overrides: list[str]):
    from llada_megatron.dryrun.rank import run_rank

    config = dry_configuration(overrides)
    stage = rules.check(config).stages[BDLM]
    return [run_rank(config, stage, 0, 2, fake=fake) for fake in (False, True)]


def test_real_tensors_on_a_cpu_are_as_many_bytes_as_fake_ones() -> None:
    # With bf16 the routers' counts become fp32 in the first forward; the dry run has them so at once.
    real, fake = run_ranks(real_and_fake, ["precision=fp32"])[0]
    assert real.kept == fake.kept and real.static == fake.static
    assert real.peak == fake.peak


def places_that_change() -> tuple[list, list, list]:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.pipeline_parallel import combined_1f1b, schedules
    from megatron.core.pipeline_parallel.utils import ScheduleNode
    from megatron.core.transformer.moe.token_dispatcher import (
        MoEAllGatherTokenDispatcher,
        MoEAlltoAllTokenDispatcher,
    )

    from llada_megatron.attention import registry
    from llada_megatron.dryrun.rank import run_rank
    from llada_megatron.objectives.diffusion import Diffusion
    from llada_megatron.objectives.preference import Preference
    from llada_megatron.runtime import fake_world
    from llada_megatron.training import step

    def places() -> list:
        return [
            *(torch.nn.RMSNorm.forward, torch.nn.Module._apply, torch.tensor, torch.Tensor.type),
            *(torch.get_rng_state, dist.all_gather_object, parallel_state.create_group),
            *(MoEAlltoAllTokenDispatcher.preprocess, MoEAlltoAllTokenDispatcher.__init__),
            MoEAllGatherTokenDispatcher.dispatch_postprocess,
            *(fused_bias_swiglu.weighted_swiglu, schedules.forward_step, schedules.backward_step),
            *(combined_1f1b.combined_forward_backward_step, ScheduleNode._forward, ScheduleNode._backward),
            torch.UntypedStorage.resize_,
            *(registry.select_backend, Diffusion.corrupt, Preference.mask, step.micro_batches),
        ]

    before = places()
    with fake_world.contracts():
        during = places()
    config = dry_configuration([])
    run_rank(config, rules.check(config).stages[MDLM], 0, 1)
    after = places()
    return (
        [str(place) for place, other in zip(before, during, strict=True) if place is not other],
        [str(place) for place, other in zip(before, after, strict=True) if place is not other],
        [dist.is_initialized()],
    )


def test_a_dry_run_puts_everything_back() -> None:
    changed_inside, changed_after, group = run_ranks(places_that_change)[0]
    assert len(changed_inside) >= 9
    assert not changed_after and group == [False]


# Parameters of every place in the grid


def counts(overrides: list[str]) -> tuple[int, int]:
    from dataclasses import asdict

    from llada_megatron.dryrun.rank import count_parameters

    config = dry_configuration(overrides)
    ranks = exact.one_rank_per_shard(config.layout)
    return exact.counted_parameters(config, [asdict(count_parameters(config, rank)) for rank in ranks])


def test_parameters_of_every_place_in_the_grid_add_up_to_the_model() -> None:
    layout = ["layout.processes=8", "layout.tp=2", "layout.pp=2", "layout.ep=2", "model.layers=4"]
    counted, expected = run_ranks(counts, layout)[0]
    assert counted == expected


def test_padding_of_small_parameters_is_counted_and_the_optimizers_share_is_bounded() -> None:
    for one in run_ranks(comparisons, BDLM, ["model.head_dim=32", "layout.processes=2"])[0]:
        static = one.report["static"]
        assert (static["weights"], static["gradients"]) == (one.static["weights"], one.static["gradients"])
        assert one.static["weights"] > 2 * one.parameters.trained + 8 * one.parameters.bias
        assert static["optimizer"] <= one.static["optimizer"] <= static["optimizer"] * 1.01


def test_halves_that_context_parallelism_cuts_are_bounded() -> None:
    overrides = ["layout.processes=4", "layout.cp=4", "layout.micro_batch=1", "data.sequence_length=128"]
    (one,) = run_ranks(comparisons, 1, overrides)[0]
    assert one.report["kept"][0] <= one.kept[0]
    assert one.report["peak"] <= one.peak
