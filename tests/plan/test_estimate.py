"""A plan's parts add up, and its time moves the right way when a layout or a cluster changes."""

from dataclasses import replace

import pytest

from llada_megatron.config import rules
from llada_megatron.config.families.gpt import active_weights
from llada_megatron.config.flops import mfu
from llada_megatron.config.schema import Config, Recompute, StageConfig
from llada_megatron.plan.estimate import Plan, flops_per_token, plan
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.report import print_plan
from llada_megatron.plan.timing import pipeline_seconds
from tests.plan.flash import composed, config_with


def planned(config: Config, **options: float) -> Plan:
    return plan(Planner(config, **options), config.layout, rules.check(config))


def flash(**layout: object) -> Config:
    """tp 2, pp 4, ep 16 on 512 GPUs, evenly cut, nothing overlapped, unless said otherwise; in bf16, with one
    sequence a micro-batch in every stage.
    """
    plain = {
        "tp": 2,
        "cp": 1,
        "vpp": 1,
        "ep": 16,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }
    of_no_package = ("layout=h100_512x_pp4_vpp8_cp2_ep8", "precision=bf16")
    config = composed("experiment=llada2_flash_cpt", "cluster=h100_512", *of_no_package)
    return alike(config_with(config, **(plain | layout)))


def alike(config: Config) -> Config:
    """Stages without micro-batches of their own."""
    stages = [replace(stage, micro_batch=0) for stage in config.schedule.stages]
    return replace(config, schedule=replace(config.schedule, stages=stages))


def on(config: Config, **cluster: object) -> Config:
    return replace(config, cluster=replace(config.cluster, **cluster))


def test_parts_add_up() -> None:
    result = planned(flash())
    for rank in result.ranks:
        assert sum(rank.activations.values()) == rank.parts["activations"]
        assert rank.peak == sum(rank.parts.values())
    for stage in result.stages:
        assert sum(stage.seconds.values()) == pytest.approx(stage.step_seconds)
        assert stage.tokens_per_sec * stage.step_seconds == pytest.approx(stage.tokens / stage.steps)
        assert stage.gpu_hours == 512 * stage.hours
    assert result.fits == (max(rank.peak for rank in result.ranks) <= 0.9 * 80e9)


def test_equal_ranks_wait_for_each_other_as_the_textbook_says() -> None:
    work, bubble = pipeline_seconds([2.0], [4], micro_batches=8, vpp=1)
    assert bubble / work == pytest.approx((4 - 1) / 8)
    assert pipeline_seconds([2.0], [4], micro_batches=8, vpp=2)[1] / work == pytest.approx((4 - 1) / (2 * 8))


def test_the_slowest_rank_sets_the_pace() -> None:
    assert pipeline_seconds([1.0, 3.0], [3, 1], micro_batches=10, vpp=1) == (30.0, 3.0)


@pytest.mark.parametrize("complementary", [False, True])
@pytest.mark.parametrize(("dtype", "peak"), [("bf16", 989e12), ("fp32", 67e12)])
def test_mfu_counts_what_each_stage_trains_over_the_peak_of_the_dtype(
    dtype: str, peak: float, complementary: bool
) -> None:
    config = on(flash(), peak_tflops=989.0, peak_tflops_fp32=67.0)
    config = replace(
        config,
        precision=replace(config.precision, dtype=dtype),
        diffusion=replace(config.diffusion, complementary=complementary, mask_rate_max=0.8),
        schedule=replace(
            config.schedule,
            stages=[
                StageConfig("ar", "1", 2**34, "autoregressive"),
                StageConfig("bdlm", "32", 2**34),
                StageConfig("mdlm", "full", 2**34),
            ],
        ),
    )
    model, L = config.model, config.data.sequence_length
    weights = sum(active_weights(model).values())
    rate = 0.5 if complementary else (1e-3 + 0.8) / 2
    expected = {"ar": (L, L * (L + 1) / 2, L - 1), "bdlm": (2 * L, L * (L + 32), L * rate)}
    expected["mdlm"] = (L, L * L, L * rate)
    for timed, stage in zip(planned(config).stages, rules.schedule_of(config).stages, strict=True):
        rows, pairs, supervised = expected[stage.name]
        flops = 6 * weights * rows + 12 * model.heads * model.head_dim * model.layers * pairs
        flops += 6 * model.hidden_size * model.vocab_size * supervised
        by_hand = flops / L * timed.tokens_per_sec / (512 * peak)
        assert timed.mfu == pytest.approx(by_hand, rel=1e-12)
        assert timed.mfu == mfu(config, stage, timed.tokens_per_sec, devices=512)  # as the loop calls it


def test_model_flops_are_six_per_active_weight_and_row_and_the_attention_of_visible_pairs() -> None:
    config = flash()
    model, L = config.model, 4096
    stages = {stage.name: stage for stage in rules.schedule_of(config).stages}
    weights = sum(active_weights(model).values())
    rate = (1e-3 + 1) / 2
    head = 6 * model.hidden_size * model.vocab_size * rate
    for name, rows, pairs in (("stable", 1, L), ("decay_32", 2, L + 32)):
        needed, performed = flops_per_token(config, config.layout, stages[name])
        attention = 12 * 32 * 128 * model.layers * pairs
        assert needed == pytest.approx(6 * weights * rows + attention + head)
        assert performed == pytest.approx(needed + head / 3)  # 2051 rows are three chunks of the head
    full = replace(config.layout, recompute=Recompute.full)
    needed, performed = flops_per_token(config, full, stages["stable"])
    assert performed == pytest.approx(needed * 4 / 3)


def test_recompute_saves_memory_and_costs_time() -> None:
    plans = [
        planned(flash(recompute=recompute, recompute_modules=["mlp", "moe"]))
        for recompute in (Recompute.none, Recompute.selective, Recompute.full)
    ]
    peaks, hours = [one.fullest.peak for one in plans], [one.hours for one in plans]
    assert peaks == sorted(peaks, reverse=True) and hours == sorted(hours)
    assert len(set(peaks)) == len(set(hours)) == 3


def test_faster_machines_are_faster_and_larger_ones_fit_more() -> None:
    slow = planned(flash())
    for name in ("peak_tflops", "memory_gb_per_sec", "node_gb_per_sec", "network_gb_per_sec"):
        config = flash()
        assert planned(on(config, **{name: 2 * getattr(config.cluster, name)})).hours < slow.hours
    assert not planned(on(flash(), memory_gb=40.0)).fits and slow.fits


def test_a_busier_process_takes_more_memory_and_time() -> None:
    even, uneven = planned(flash(), expert_imbalance=1.0), planned(flash(), expert_imbalance=2.0)
    assert even.fullest.peak < uneven.fullest.peak and even.hours < uneven.hours


def test_overlap_hides_gradients_and_weights() -> None:
    plain, overlapped = planned(flash()), planned(flash(overlap_grad_reduce=True, overlap_param_gather=True))
    for before, after in zip(plain.stages, overlapped.stages, strict=True):
        assert after.seconds["gradients"] < before.seconds["gradients"]


def test_messages_hide_behind_computation_only_where_the_cluster_lets_them() -> None:
    for layout in (
        flash(),
        flash(vpp=2),
        flash(overlap_grad_reduce=True),
        flash(overlap_grad_reduce=True, overlap_param_gather=True),
    ):
        none, half, all_of_it = (planned(on(layout, message_overlap=share)) for share in (0.0, 0.5, 1.0))
        assert none.hours > half.hours > all_of_it.hours
    shown = planned(on(flash(), message_overlap=0.0)).stages[0]
    (tensor,) = (group for group in shown.traffic if group.group == "tp")
    assert shown.seconds["tp"] == pytest.approx(tensor.seconds, rel=0.2)


def test_fewer_layers_on_the_last_stage_shorten_the_wait_for_the_head() -> None:
    assert planned(flash(pipeline=[8, 8, 9, 7])).ranks[3].peak < planned(flash()).ranks[3].peak


def test_memory_is_that_of_the_stage_that_needs_most() -> None:
    result = planned(flash())
    rows = {stage.name: stage.rows for stage in result.stages}
    assert all(rows[rank.stage] == 8192 for rank in result.ranks)


def test_a_price_gives_a_cost() -> None:
    assert planned(flash()).cost is None
    result = planned(on(flash(), price_per_gpu_hour=2.5))
    assert result.cost == pytest.approx(2.5 * 512 * result.hours)


@pytest.mark.parametrize("model", ["small", "tiny"])
def test_small_models_on_a_cpu_are_planned_in_fp32(model: str) -> None:
    result = planned(composed("experiment=bench", f"model={model}", "cluster=local"))
    assert result.fits and result.hours > 0


def test_a_dense_model_is_planned() -> None:
    config = flash(ep=1)
    dense = replace(config, model=replace(config.model, dense_layers=32, experts=0, tied_head=True))
    result = planned(dense)
    assert result.hours > 0 and "experts" not in result.fullest.activations
    assert {group.group for group in result.stages[0].traffic} == {"tp", "pp", "dp", "embedding"}


# A forward pass before a step's own


def confident(micro_batches: int) -> Config:
    """CAP on 8 GPUs with so many micro-batches per rank."""
    config = config_with(
        composed("experiment=llada2_mini_cap", "cluster=h100_8"),
        **{"processes": 8, "pp": 1, "ep": 8, "vpp": 1, "pipeline": [], "micro_batch": 1},
        **{"global_batch": 8 * micro_batches, "overlap_grad_reduce": False, "overlap_param_gather": False},
    )
    return on(config, memory_gb=1000)


def test_cap_counts_in_a_forward_pass_first_where_a_rank_has_several_micro_batches() -> None:
    (one,), (two,), (four,) = (planned(confident(count)).stages for count in (1, 2, 4))
    assert [stage.passes_before for stage in (one, two, four)] == [0, 1, 1]
    assert "before" not in one.seconds and four.seconds["before"] == pytest.approx(2 * two.seconds["before"])
    trained = two.step_seconds - two.seconds["before"]
    work = trained - two.seconds["gradients"] - two.seconds["optimizer"]
    assert 0.25 * work < two.seconds["before"] < 0.45 * work  # a forward is a third of the FLOPs
    assert sum(two.seconds.values()) == pytest.approx(two.step_seconds)
    needed, performed = two.model_flops_per_token, two.performed_flops_per_token
    assert performed - one.performed_flops_per_token == pytest.approx(needed / 3)
    assert needed == one.model_flops_per_token
    assert two.mfu == pytest.approx(needed * two.tokens_per_sec / (8 * 989e12), rel=1e-3)


def test_a_pass_before_the_step_sends_its_forward_messages_again() -> None:
    def sent(count: int) -> dict[str, float]:
        (stage,) = planned(confident(count)).stages
        return {group.group: group.payload for group in stage.traffic}

    one, two = sent(1), sent(2)
    assert two["ep"] == pytest.approx(
        3 * one["ep"]
    )  # twice as many micro-batches, and as much forward as backward
    assert two["dp"] == one["dp"]


def test_the_plan_says_in_words_that_a_pass_comes_first(capsys) -> None:
    for count, expected in ((1, False), (2, True)):
        config = confident(count)
        print_plan(planned(config), config)
        said = " ".join(capsys.readouterr().out.split())
        assert ("1 forward pass over the batch before each step's own" in said) == expected
        assert ("none with one micro-batch per rank" in said) == expected


@pytest.mark.parametrize("layout", [{}, {"recompute": Recompute.full}], ids=["kept", "recomputed"])
def test_the_imbalance_that_memory_holds_fits_and_a_tenth_more_does_not(layout: dict[str, object]) -> None:
    config = flash(**layout)
    largest = planned(config).largest_imbalance
    assert largest is not None
    assert planned(config, expert_imbalance=largest).fits
    if layout:
        assert largest == config.layout.ep  # all rows at one process
    else:
        assert not planned(config, expert_imbalance=largest + 0.1).fits
    assert planned(flash(ep=1, processes=8, tp=1, pp=1)).largest_imbalance is None


def test_a_longer_stage_of_the_run_is_planned_with_its_length_and_its_batch() -> None:
    config = alike(composed("experiment=llada2_flash_32k", "cluster=h100_512"))
    assert config.layout.cp == 8
    result = planned(config)
    assert result.fits
    short, long = result.stages[-2:]
    assert (short.rows, long.rows) == (2 * 4096, 2 * 32768)
    assert (short.micro_batches, long.micro_batches) == (128, 16)  # with as many tokens in a step
    assert long.tokens / long.steps == short.tokens / short.steps
    assert (
        long.model_flops_per_token > 1.5 * short.model_flops_per_token
    )  # attention reads eight times as far
    as_its_own = replace(config, layout=replace(config.layout, global_batch=128))
    as_its_own.schedule.stages = [config.schedule.stages[-1]]
    (alone,) = planned(as_its_own).stages
    assert alone.step_seconds == long.step_seconds
