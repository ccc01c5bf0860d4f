"""What layers keep: a dry run's bytes where the formula is the same, derivations by hand where it is ours."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llada_megatron.config import rules
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schema import LayoutConfig, Recompute
from llada_megatron.parallel.context import deal_tokens
from llada_megatron.plan import activations
from llada_megatron.plan.activations import (
    gather_buffer,
    head_bytes,
    held_bytes,
    kept,
    layer_parts,
)
from llada_megatron.plan.memory import units
from llada_megatron.plan.shapes import keeps_blocks_whole, shape_of
from llada_megatron.plan.transient import head_backward, head_forward
from tests.plan.flash import balanced_shape, composed, config_with, model_of

DRY_RUN = [  # model, tp, cp, rows, micro-batch, dense layer with embedding, MoE layer
    ("flash", 2, 2, 8192, 1, 314249216, 406249472),
    ("flash", 1, 1, 4096, 1, 545472512, 797818880),
    ("mini", 1, 1, 8192, 2, 1166868480, 1658257408),
    ("mini", 4, 2, 16384, 1, 183066624, 208855040),
    ("flash", 4, 4, 32768, 1, 342712320, 399958016),
]


@pytest.mark.parametrize(("name", "tp", "cp", "rows", "micro_batch", "dense", "moe"), DRY_RUN)
def test_layers_keep_what_a_dry_run_of_megatron_core_kept(
    name, tp, cp, rows, micro_batch, dense, moe
) -> None:
    model, layout = model_of(name), LayoutConfig(tp=tp, cp=cp)
    shape = balanced_shape(tp=tp, cp=cp, rows=rows, micro_batch=micro_batch)
    batch = 28 * shape.rows + 4 * shape.rotary_rows * 64  # that run's own inputs, and its rotary angles
    first = layer_parts(model, shape, layout, moe=False, b=2)
    other = layer_parts(model, shape, layout, moe=True, b=2)
    output = 2 * shape.tokens * model.hidden_size
    tokens = 9 * shape.rows if tp > 1 else 0
    beside = gather_buffer(model, shape, layout, b=2) + output + tokens + batch
    assert sum(first.values()) + beside == dense
    assert sum(other.values()) + held_bytes(model, shape, layout) == moe


def test_context_parallelism_keeps_clean_keys_and_its_own_noisy_ones() -> None:
    config = config_with(composed("experiment=llada2_flash_cpt"), processes=512, tp=1, pp=1, cp=2, ep=1)
    stages = {stage.name: stage for stage in rules.schedule_of(config).stages}
    g = 4 * 128

    def shape(name):
        return shape_of(config, config.layout, stages[name], expert_imbalance=1.0)

    small, large, whole = shape("decay_32"), shape("decay_2048"), shape("stable")
    assert (small.rows, small.keys, small.gathered) == (4096, 4096 + 2048, 4096)
    assert (large.keys, large.gathered) == (2 * 4096, 2 * 4096)  # blocks of L/2 are cut: noisy keys travel
    assert (whole.rows, whole.keys, whole.gathered) == (4096, 8192, 8192)  # of two sequences
    parts = layer_parts(config.model, small, config.layout, moe=True, b=2)
    assert parts["core_attn"] == 4 * 4096 * 32 + 2 * 2 * (4096 + 2048) * g


def test_the_head_keeps_rows_where_it_is_chunked_and_probabilities_where_it_is_not() -> None:
    model, layout = replace(model_of("flash"), head_chunk_tokens=1024), LayoutConfig(tp=2)
    shape = replace(balanced_shape(tp=2, cp=1, rows=8192), supervised=2048)
    rows = 4096 * (2 * 4096 + 4) + 8 * 86  # the final norm's input and 1/rms
    assert head_bytes(model, shape, layout, b=2) == rows + 2048 * (2 * 4096 + 12 + 8)
    one = replace(shape, supervised=1000)
    assert head_bytes(model, one, layout, b=2) == rows + 1000 * (2 * 4096 + 12 + 4 * 78592 + 9)
    # rows' gradients; a weight gradient, summed where it stays, and the gradient of a chunk's logits
    assert head_backward(model, shape, layout, b=2) == 2 * 2048 * 4096 + 2 * 78592 * 4096 + 2 * 1024 * 78592


def test_a_readout_keeps_figures_and_copies_logits_and_a_preference_keeps_its_texts() -> None:
    model, layout = replace(model_of("flash"), head_chunk_tokens=1024), LayoutConfig(tp=2)

    def head(objective: str, n: int) -> tuple[int, int, int]:
        row = OBJECTIVES[objective].row_bytes
        shape = replace(balanced_shape(tp=2, cp=1, rows=8192), supervised=n, row_bytes=row)
        moments = head_forward(model, shape, layout, b=2), head_backward(model, shape, layout, b=2)
        kept = head_bytes(model, shape, layout, b=2)
        return kept, kept + moments[0], moments[1]

    V, copies = 78592, 4 * 78592
    for n, chunk in ((2048, 1024), (1000, 1000)):
        plain, cap, dpo = (head(name, n) for name in ("diffusion", "confidence", "preference"))
        assert cap[0] - plain[0] == n * (12 + (8 if n == chunk else 0))  # 3 figures; 2 sums of a row
        assert cap[1] - plain[1] == copies * chunk
        assert dpo[0] - plain[0] == n * 21 and dpo[1:] == plain[1:]
    assert head("confidence", 1000)[2] == max(head("diffusion", 1000)[2], 1000 * copies)
    assert head("diffusion", 1000)[2] == 2 * V * 4096 + 2 * 1000 * 4096 - 2 * 1000 * V


def test_half_of_the_positions_are_supervised_and_all_but_the_first_of_an_autoregressive_stage() -> None:
    config = composed("experiment=bench")
    ar, mdlm, bdlm = rules.schedule_of(config).stages
    supervised = [
        shape_of(config, config.layout, stage, expert_imbalance=1.0).supervised for stage in (ar, mdlm, bdlm)
    ]
    assert supervised == [2 * 1023, 1025, 1025]  # two sequences of 1024 at a rate of 0.5 and a little


def test_experts_on_one_process_see_no_imbalance() -> None:
    config = composed("experiment=llada2_mini_cpt")
    stage = rules.schedule_of(config).stages[0]
    alone, spread = (
        shape_of(config, replace(config.layout, ep=ep), stage, expert_imbalance=1.5) for ep in (1, 8)
    )
    assert alone.routed == alone.sent and spread.routed == spread.sent * 3 // 2


MODULES = ["core_attn", "mlp", "moe", "shared_experts", "layernorm", "moe_act"]


@st.composite
def cases(draw: st.DrawFn):
    """A configuration and one stage of its schedule."""
    name = draw(st.sampled_from(["mini", "flash"]))
    layout = dict(
        tp=draw(st.sampled_from([1, 2, 4])),
        cp=draw(st.sampled_from([1, 2, 4])),
        pp=1,
        ep=draw(st.sampled_from([1, 8])),
        etp=draw(st.sampled_from([1, 2])),
        micro_batch=draw(st.sampled_from([1, 2])),
        recompute=Recompute.none,
    )
    config = config_with(composed(f"experiment=llada2_{name}_cpt"), **layout)
    return config, draw(st.sampled_from(rules.schedule_of(config).stages)), draw(st.sampled_from([2, 4]))


def kept_by(config, stage, b, moe=True, **layout):
    changed = replace(config.layout, **layout)
    shape = shape_of(config, changed, stage, expert_imbalance=1.2)
    parts = layer_parts(config.model, shape, changed, moe=moe, b=b)
    return sum(kept(config.model, parts, shape, changed, b=b).values())


@given(case=cases(), modules=st.lists(st.sampled_from(MODULES), unique=True), moe=st.booleans())
def test_more_recompute_never_keeps_more(case, modules, moe) -> None:
    config, stage, b = case
    sizes = [
        kept_by(config, stage, b, moe, recompute=Recompute.selective, recompute_modules=modules[:count])
        for count in range(1, len(modules) + 1)
    ]
    none = kept_by(config, stage, b, moe)
    full = kept_by(config, stage, b, moe, recompute=Recompute.full)
    assert [none, *sizes, full] == sorted([none, *sizes, full], reverse=True)


@given(case=cases(), moe=st.booleans())
def test_more_context_parallelism_never_keeps_more(case, moe) -> None:
    config, stage, b = case
    assume(config.layout.cp < 4)
    sizes = [kept_by(config, stage, b, moe, cp=cp) for cp in (1, 2, 4)]
    assert sizes == sorted(sizes, reverse=True)


@given(case=cases(), moe=st.booleans())
def test_larger_micro_batches_keep_more_and_fp32_keeps_more(case, moe) -> None:
    config, stage, _ = case
    larger = replace(stage, micro_batch=2 * stage.micro_batch)
    assert kept_by(config, larger, 2, moe) > kept_by(config, stage, 2, moe)
    assert kept_by(config, stage, 4, moe) > kept_by(config, stage, 2, moe)


@given(case=cases())
def test_recomputed_bytes_are_alive_while_a_layer_runs_backward(case) -> None:
    config, stage, b = case
    shape = shape_of(config, config.layout, stage, expert_imbalance=1.2)
    full = replace(config.layout, recompute=Recompute.full)
    plain, again = (units(config.model, shape, layout, b=b).moe for layout in (config.layout, full))
    assert again.dropped == plain.kept - again.kept
    assert again.backward >= plain.backward + again.dropped - 8 * shape.sent  # the copies' order is held
    assert activations.recomputed_modules(full) >= {"attention", "core_attn", "moe"}


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("block_size", [32, 512, 1024, 2048])
def test_blocks_stay_whole_where_context_parallelism_deals_them_whole(cp: int, block_size: int) -> None:
    stage = replace(
        rules.schedule_of(composed("experiment=llada2_flash_cpt")).stages[0], block_size=block_size
    )
    L = 4096
    block_start = np.arange(L) // block_size * block_size
    owner = deal_tokens(2 * block_start + 2 * block_size, block_start, block_size, cp)  # noisy and clean row
    whole = all(len(set(owner[start : start + block_size])) == 1 for start in range(0, L, block_size))
    assert keeps_blocks_whole(stage, cp) == whole
