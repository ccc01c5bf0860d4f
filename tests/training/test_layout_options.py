"""Recompute, overlap, uneven pipelines and the other dispatcher change nothing that a run computes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings

from llada_megatron.config import rules
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from tests.config.test_layout import configs
from tests.distributed import run_ranks
from tests.training.runs import (
    STEPS,
    TWO,
    assert_equal_within_rounding,
    checkpoint,
    comparable,
    configure,
    records,
    train,
    train_rank,
)

FOUR = "layout.processes=4"
OVERLAP = ["layout.overlap_grad_reduce=true", "layout.overlap_param_gather=true"]
SELECTIVE = "layout.recompute=selective"


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    """A run of one process without any option."""
    run_dir = tmp_path_factory.mktemp("straight")
    train(configure(corpus, run_dir))
    return run_dir


def built(config: Config) -> dict[str, Any]:
    """What the options made of this rank's model."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer

    groups.initialize(config.layout)
    trainer = build_trainer(config, rules.schedule_of(config))
    stages = [chunk.module for chunk in trainer.model]
    experts = [layer.mlp for stage in stages for layer in stage.decoder.layers if layer.is_moe_layer]
    ddp, schedule = trainer.model[0].ddp_config, stages[0].config
    return {
        "layers": [len(stage.decoder.layers) for stage in stages],
        "dispatchers": {type(layer.token_dispatcher).__name__ for layer in experts},
        "recompute": (
            schedule.recompute_granularity,
            schedule.recompute_method,
            schedule.recompute_num_layers,
        ),
        "moe_recomputed": {layer.moe_layer_recompute for layer in experts},
        "overlap": (ddp.overlap_grad_reduce, ddp.overlap_param_gather, ddp.align_param_gather),
        "functions": (schedule.no_sync_func is not None, schedule.param_sync_func is not None),
    }


def test_every_option_reaches_megatron_core(corpus, tmp_path):
    interleaved = [TWO, "layout.pp=2", "layout.vpp=2", "layout.pipeline=[1,2,1,0]", *OVERLAP]
    config = configure(corpus, tmp_path, *interleaved, SELECTIVE, "layout.recompute_modules=[moe]")
    first, last = run_ranks(built, config, processes=2)
    assert (first.pop("layers"), last.pop("layers")) == ([1, 1], [2, 0])
    assert first == last == {
        "dispatchers": {"MoEAlltoAllTokenDispatcher"},
        "recompute": ("selective", None, None),
        "moe_recomputed": {True},
        "overlap": (True, True, True),
        "functions": (True, True),
    }  # fmt: skip
    config = configure(corpus, tmp_path, "layout.recompute=full", "layout.dispatcher=allgather")
    assert run_ranks(built, config) == [
        {
            "layers": [4],
            "dispatchers": {"MoEAllGatherTokenDispatcher"},
            "recompute": ("full", "uniform", 1),
            "moe_recomputed": {False},
            "overlap": (False, False, False),
            "functions": (False, False),
        }
    ]


RECOMPUTE = {
    "full": ["layout.recompute=full"],
    "selective": [SELECTIVE],
    "with experts": [SELECTIVE, "layout.recompute_modules=[core_attn,moe]"],
}


def test_recompute_leaves_every_figure_as_it_is_bit_for_bit(corpus, straight, tmp_path):
    train(*(configure(corpus, tmp_path / name, *options) for name, options in RECOMPUTE.items()))
    for name in RECOMPUTE:
        assert comparable(tmp_path / name) == comparable(straight), name


def train_in_small_buckets(all_configs: list[Config]) -> list[tuple[int, int, bool]]:
    """As `train_rank`, with gradients and weights in many messages of odd sizes."""
    from llada_megatron.training import optimizer

    optimizer.BUCKET_ELEMENTS = optimizer.BUCKET_ELEMENTS_PER_RANK = 5_000
    return train_rank(all_configs)


def not_the_optimizers(folder: Path) -> list[str]:
    """Weights of a checkpoint that differ from the fp32 ones that its optimizer updates."""
    from llada_megatron.checkpoint.shards import tensors_of

    tensors = dict(tensors_of(folder))
    prefix = "optimizer.state.param."
    masters = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    assert masters
    return [name for name, value in masters.items() if not tensors[name].equal(value)]


def assert_goes_on_as_one_process(corpus: str, straight: Path, run_dir: Path) -> None:
    """From the checkpoint of another layout: its weights and moments were whole."""
    train(configure(corpus, run_dir))
    assert len(records(run_dir)) == STEPS
    assert_equal_within_rounding(run_dir, straight)
    for mine, theirs in zip(records(run_dir), records(straight), strict=True):
        for figure in ("mask_row_norm", "embedding_noise_sigma"):
            assert mine[figure] == pytest.approx(theirs[figure], rel=1e-6)


OVERLAPPED = [
    [TWO, "layout.ep=2", "layout.dispatcher=allgather"],
    pytest.param([FOUR, "layout.pp=2", "layout.vpp=2", "layout.ep=2"], marks=pytest.mark.slow),
    pytest.param([FOUR, "layout.tp=2", "layout.recompute=full"], marks=pytest.mark.full),
]


@pytest.mark.parametrize("layout", OVERLAPPED, ids=" ".join)
def test_overlapped_gradients_and_weights_are_those_of_one_process(corpus, straight, tmp_path, layout):
    config = configure(corpus, tmp_path, *layout, *OVERLAP, "training.steps=4")
    run_ranks(train_in_small_buckets, [config], processes=config.layout.processes)
    assert run_ranks(not_the_optimizers, checkpoint(tmp_path, 4)) == [[]]
    assert_goes_on_as_one_process(corpus, straight, tmp_path)


def gathers_of_buckets(config: Config, steps: int) -> list[int]:
    """How often this rank gathered the weights of each bucket."""
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    gathered: Counter[int] = Counter()
    start = _ParamAndGradBucketGroup.start_param_sync

    def counted(group: Any, *args: Any, **options: Any) -> None:
        gathered[id(group)] += 1
        start(group, *args, **options)

    _ParamAndGradBucketGroup.start_param_sync = counted
    groups.initialize(config.layout)
    trainer = build_trainer(config, rules.schedule_of(config))
    for step in range(steps):
        assert train_step(trainer, step).embedding_noise_sigma > 0
    return list(gathered.values())


@pytest.mark.slow
def test_noise_on_embeddings_leaves_one_gather_of_every_bucket_in_a_step(corpus, tmp_path):
    config = configure(corpus, tmp_path, TWO, "layout.pp=2", "layout.vpp=2", *OVERLAP)
    for counts in run_ranks(gathers_of_buckets, config, 2, processes=2):
        assert set(counts) == {2}


PIPELINES = [
    [TWO, "layout.pp=2", "layout.pipeline=[1,3]"],
    pytest.param(
        [TWO, "layout.pp=2", "layout.pipeline=[0,4]", "layout.recompute=full"], marks=pytest.mark.full
    ),
    pytest.param([TWO, "layout.pp=2", "layout.vpp=2", "layout.pipeline=[1,2,1,0]"], marks=pytest.mark.slow),
    # The first stage has no experts, the second has.
    pytest.param([FOUR, "layout.pp=2", "layout.ep=2", "layout.pipeline=[1,3]"], marks=pytest.mark.full),
]  # fmt: skip


@pytest.mark.parametrize("layout", PIPELINES, ids=" ".join)
def test_an_uneven_pipeline_equals_one_process(corpus, straight, tmp_path, layout):
    train(configure(corpus, tmp_path, *layout, "training.steps=4"))
    assert_goes_on_as_one_process(corpus, straight, tmp_path)


EXPERTS = [
    [TWO, "layout.etp=2", "layout.dispatcher=allgather"],
    [TWO, "layout.tp=2", SELECTIVE, "layout.recompute_modules=[core_attn,mlp,moe,shared_experts]"],
    pytest.param([TWO, "layout.etp=2"], marks=pytest.mark.full),
    pytest.param([TWO, "layout.tp=2", "layout.ep=2", "layout.dispatcher=allgather"], marks=pytest.mark.full),
]


@pytest.mark.slow
@pytest.mark.parametrize("layout", EXPERTS, ids=" ".join)
def test_experts_over_processes_equal_one_process_and_count_each_token_once(
    corpus, straight, tmp_path, layout
):
    train(configure(corpus, tmp_path, *layout))
    assert_equal_within_rounding(tmp_path, straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        ["layout.pp=2", "layout.vpp=2"],
        pytest.param(["layout.pp=2"], marks=pytest.mark.full),
        pytest.param(OVERLAP, marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_a_tied_head_is_one_weight_on_two_processes(corpus, tmp_path, layout):
    tied = "model.tied_head=true"
    train(configure(corpus, tmp_path / "one", tied))
    train(configure(corpus, tmp_path / "two", tied, TWO, *layout))
    assert_equal_within_rounding(tmp_path / "two", tmp_path / "one")


def megatron_core_refuses(config: Config) -> Exception | None:
    from llada_megatron.model.families.gpt import transformer_config

    layer_spec = "transformer_engine" if config.model.layer_spec == "transformer_engine" else "local"
    try:
        transformer_config(config, layer_spec=layer_spec)
    except (AssertionError, ValueError) as error:
        return error
    return None


@settings(max_examples=200)
@given(config=configs())
def test_what_megatron_core_refuses_was_refused_before(config):
    from llada_megatron.parallel import groups  # noqa: F401  # the seam comes first

    try:
        rules.check(config)
    except BadInput:
        return
    assert megatron_core_refuses(config) is None
