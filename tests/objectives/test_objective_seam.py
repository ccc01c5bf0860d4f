"""Objectives of other kinds go through the same step: each layout and micro-batch gives the same figures.

A loss that is no sum over rows, two denominators at once, and a pass without gradients before the step's own.
"""

import importlib
from typing import Any

import pytest
import torch

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schema import Config
from llada_megatron.objectives.passes import ratios_of
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks

FAKES = ("pairs", "drafts")
NAMES = (*FAKES, "confidence")
LAYOUTS = {
    "pp2": ["layout.pp=2"],
    "cp2": ["layout.cp=2"],
    "dp2": ["layout.processes=2"],
    "tp2": ["layout.tp=2"],
    "vpp2": ["layout.pp=2", "layout.vpp=2"],
}


MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("dp2", "tp2", "vpp2")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("paragraphs"))


def configure(corpus: str, name: str, *overrides: str) -> Config:
    """A small model, 8 samples a step, blocks of 4 and then one block."""
    stages = [
        f"{{name: {size}, block_size: '{size}', tokens: 512, objective: {name}}}" for size in ("4", "full")
    ]
    return compose(
        [
            "experiment=parity",
            f"data.path=[{corpus}]",
            "data.split='8,2'",
            "data.sequence_length=64",
            f"schedule.stages=[{', '.join(stages)}]",
            "model.hidden_size=64",
            "model.head_dim=16",
            "model.expert_hidden_size=32",
            "model.head_chunk_tokens=48",
            "optimizer.warmup_tokens=0",
            f"layout.micro_batch={2 if name == 'pairs' else 1}",
            "layout.global_batch=8",
            *overrides,
        ]
    )


def register() -> None:
    """As docs/extending.md says: a line in OBJECTIVES for the module of each."""
    for name in FAKES:
        OBJECTIVES[name] = importlib.import_module(f"tests.objectives.{name}").GEOMETRY


def trained(config: Config) -> dict[str, Any]:
    """Losses, norms, figures and balance of every step, and what was made of each sample."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    register()
    groups.initialize(config.layout)
    schedule = rules.schedule_of(config)
    trainer = build_trainer(config, schedule)
    digests: dict[int, str] = {}
    trainer.on_batch = lambda indices, batch: digests.update(
        {index: batch.digest(place) for place, index in enumerate(indices)}
    )
    steps = [train_step(trainer, step) for step in range(schedule.total_steps)]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "load": [step.load_max_over_mean for step in steps],
        "figures": [step.figures for step in steps],
        "digests": digests,
    }


@pytest.fixture(scope="module")
def straight(corpus) -> dict[str, dict[str, Any]]:
    register()
    return {name: run_ranks(trained, configure(corpus, name))[0] for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["pp2", "cp2", *MORE])
def test_every_layout_trains_the_same(corpus, straight, name, layout):
    register()
    expected = straight[name]
    parts = run_ranks(trained, configure(corpus, name, *LAYOUTS[layout]), processes=2)
    for found in parts:
        assert found["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
        assert found["load"] == pytest.approx(expected["load"], rel=1e-6)
        if name == "pairs":
            margins = [[step["margin"] for step in run["figures"]] for run in (found, expected)]
            assert margins[0] == pytest.approx(margins[1], rel=1e-4, abs=1e-6)
    assert {index: digest for part in parts for index, digest in part["digests"].items()} == expected[
        "digests"
    ]


@pytest.mark.parametrize(("name", "micro_batch"), [("confidence", 4), ("confidence", 8), ("drafts", 4)])
def test_micro_batches_change_nothing(corpus, straight, name, micro_batch):
    register()
    [found] = run_ranks(trained, configure(corpus, name, f"layout.micro_batch={micro_batch}"))
    assert found["loss"] == pytest.approx(straight[name]["loss"], rel=2e-6)
    assert found["grad_norm"] == pytest.approx(straight[name]["grad_norm"], rel=1e-5)
    assert found["digests"] == straight[name]["digests"]


def test_counts_are_exchanged_where_every_rank_has_one_micro_batch(corpus, straight):
    for found in run_ranks(
        trained, configure(corpus, "confidence", "layout.micro_batch=4", "layout.processes=2"), processes=2
    ):
        assert found["loss"] == pytest.approx(straight["confidence"]["loss"], rel=2e-6)
        assert found["grad_norm"] == pytest.approx(straight["confidence"]["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", sorted({*OBJECTIVES, *FAKES}))
def test_a_geometry_knows_the_passes_before_a_step(name):
    register()
    geometry, kind = OBJECTIVES[name], importlib.import_module(OBJECTIVES[name].module).OBJECTIVE
    config = compose(["experiment=parity"])
    objective = kind(name, config, rules.schedule_of(config))
    counts = geometry.denominators > 1 and not objective.counts_known
    counts = counts or objective.statistics_readout is not None
    for micro_batches in (1, 2):
        drafts = objective.draft_turns * (objective.draft_readout is not None)
        assert geometry.passes_before(config, micro_batches) == drafts + (counts and micro_batches > 1)


def gradients_of_the_formula(config: Config) -> tuple[float, float]:
    """Loss and gradient norm of the first step, from the whole global batch at once."""
    from llada_megatron.model.readout import CONFIDENCE
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer

    register()
    groups.initialize(config.layout)
    schedule = rules.schedule_of(config)
    trainer = build_trainer(config, schedule)
    stage, objective = schedule.stages[0], trainer.objectives[schedule.stages[0].objective]
    batch = objective.batch(trainer.data(0), list(range(8)), stage)
    batch.inputs.readout = CONFIDENCE
    model = trainer.model[0].module
    cross_entropy, entropy, right = model(batch.inputs).unbind(-1)
    loss = (cross_entropy * batch.rows["weights"]).sum() / batch.counts[0]
    loss = loss + config.confidence.weight * (entropy * right).sum() / right.sum()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return float(loss), float(torch.stack([g.norm() for g in found if g is not None]).norm())


def test_two_denominators_give_the_loss_of_the_formula(corpus):
    register()
    quiet = "diffusion.embedding_noise.sigma_over_rms=0"
    [found] = run_ranks(trained, configure(corpus, "confidence", quiet))
    [(loss, norm)] = run_ranks(gradients_of_the_formula, configure(corpus, "confidence", quiet))
    assert (found["loss"][0], found["grad_norm"][0]) == pytest.approx((loss, norm), rel=2e-6)


def test_a_term_of_which_nothing_was_counted_is_zero():
    assert ratios_of([10.0, 5.0, 0.0]) == [1.0, 2.0, 0.0]
