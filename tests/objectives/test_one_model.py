"""A preference with one model and a file of scores, against the formula with both models in memory.

The same comparison notices what must not happen: the mistakes are objectives that are handed to the step.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.objective import Loss
from llada_megatron.objectives.passes import counted_once, sum_over_context
from llada_megatron.objectives.preference import Preference, bounds, preference_losses
from tests.distributed import run_ranks
from tests.objectives.conversations import BLOCK, configure, score, write

REFERENCE_SEED = 2
LONG = "data.sequence_length=256"
"""Several pairs in a sequence, not everywhere as many."""
STEP = 1e-6
"""Of each weight: beyond it the differences' own error shows, which falls with the square."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    prefix = write(tmp_path_factory.mktemp("pairs"), "preference")
    score(configure(prefix, "dpo"), prefix, seed=REFERENCE_SEED)
    return prefix


def first_step(config: Config, objective: type[Preference] = Preference) -> dict[str, Any]:
    """Loss, norm and figures of the first step, of an objective in the place of the stage's."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    groups.initialize(config.layout)
    schedule = rules.check(config)
    trainer = build_trainer(config, schedule)
    trainer.objectives = {"preference": objective("preference", config, schedule)}
    step = train_step(trainer, 0)
    return {"loss": step.loss, "grad_norm": step.grad_norm, **step.figures}


def both_models(config: Config) -> dict[str, Any]:
    """The same from the formula: every pair of the global batch, scored by a policy and a reference."""
    from llada_megatron.model.provider import build_model
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer

    groups.initialize(config.layout)
    schedule = rules.check(config)
    [policy] = build_model(config)
    [reference] = build_model(replace(config, run=replace(config.run, seed=REFERENCE_SEED)))
    data = build_trainer(config, schedule).data(0)
    objective, settings = Preference("preference", config, schedule), config.preference
    draws = settings.draws
    losses, margins, chosen, tokens = [], [], [], 0
    for sequence in range(config.layout.global_batch // draws):
        indices = [sequence * draws + draw for draw in range(draws)]
        batch, texts = objective.scored(data, indices, BLOCK)
        sample = data[sequence]
        sides = []
        for model in (policy, reference):
            batch.inputs.readout = objective.readout
            cross_entropy = model(batch.inputs).double() * batch.rows["weights"]
            B_DT = [
                [-cross_entropy[batch.rows["slot"] == draw * len(texts) + t].sum() for t in range(len(texts))]
                for draw in range(draws)
            ]
            sides.append(torch.stack([torch.stack(row) for row in B_DT]).mean(dim=0))
        for pair in range(len(texts) // 2):
            w = 2 * pair
            rewards = sides[0][w : w + 2] - sides[1][w : w + 2]
            margin = settings.beta * (rewards[0] - rewards[1])
            losses.append(F.softplus(-margin))
            margins.append(float(margin.detach()))
            chosen.append(-sides[0][w])
            tokens += int(sample.supervised[sample.cu_seqlens[w] : sample.cu_seqlens[w + 1]].sum())
    loss = sum(losses) / len(losses) + settings.sft_weight * sum(chosen) / tokens
    parameters = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    gradient = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return {
        "loss": float(loss.detach()),
        "grad_norm": float(torch.stack([g.norm() for g in gradient]).norm()),
        "margin": sum(margins) / len(margins),
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "chosen_bound": float(sum(chosen).detach()) / len(chosen),
    }


@pytest.fixture(scope="module")
def expected(pairs) -> dict[str, Any]:
    return run_ranks(both_models, configure(pairs, "dpo", LONG))[0]


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Relative ones, by figure."""
    return {name: abs(found[name] - value) / abs(value) for name, value in expected.items()}


def test_a_file_of_scores_and_one_model_equal_both_models(pairs, expected):
    [found] = run_ranks(first_step, configure(pairs, "dpo", LONG))
    far = differences(found, expected)
    assert far.pop("grad_norm") < 1e-5 and max(far.values()) < 1e-6, far


@pytest.mark.slow
def test_a_reference_scored_with_other_masks_is_noticed(expected, tmp_path):
    prefix = write(tmp_path, "preference")
    config = configure(prefix, "dpo", LONG)
    score(
        configure(prefix, "dpo", "run.seed=7"), prefix, seed=REFERENCE_SEED, **{"run.seed": config.run.seed}
    )
    far = differences(run_ranks(first_step, config)[0], expected)
    assert far["chosen_bound"] < 1e-6 and far["margin"] > 0.1 and far["loss"] > 1e-3


class TornApart(Preference):
    """Chosen and rejected texts learn by themselves, as if in micro-batches of their own."""

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        whole = super().loss(batch, output)
        reward_P2 = (sum_over_context(bounds(batch, output)) - batch.whole["reference"]).mean(dim=0)
        alone = [
            preference_losses(reward_P2 * reward_P2.new_tensor(side), self.config.preference).sum() / 2
            for side in ((1, 0), (0, 1))
        ]
        return Loss([counted_once(alone[0] + alone[1]), whole.sums[1]], whole.counts, whole.figures)


class DrawsTornApart(Preference):
    """Each draw has a nonlinear part of its own, as if in a micro-batch of its own."""

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        whole = super().loss(batch, output)
        reward_DP2 = sum_over_context(bounds(batch, output)) - batch.whole["reference"]
        losses = torch.stack([preference_losses(each, self.config.preference) for each in reward_DP2])
        return Loss([counted_once(losses.mean(dim=0).sum()), whole.sums[1]], whole.counts, whole.figures)


class PerMicroBatch(Preference):
    """The mean of the micro-batches' means."""

    def batch(self, *args: Any, **kwargs: Any) -> MicroBatch:
        batch = super().batch(*args, **kwargs)
        batch.whole["own counts"] = torch.tensor(batch.counts)
        batch.counts = (1, 1)
        return batch

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        pairs, tokens = batch.whole["own counts"].tolist()
        whole = super().loss(batch, output)
        return Loss([whole.sums[0] / pairs, whole.sums[1] / tokens], batch.counts, whole.figures)


class PartialSums(Preference):
    """The nonlinear part of what a context-parallel rank holds of the sums."""

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        whole = super().loss(batch, output)
        reward_P2 = (bounds(batch, output) - batch.whole["reference"]).mean(dim=0)
        losses_P = preference_losses(reward_P2, self.config.preference)
        return Loss([counted_once(losses_P.sum()), whole.sums[1]], whole.counts, whole.figures)


@pytest.mark.parametrize(
    ("mistake", "layout"),
    [
        (TornApart, []),
        pytest.param(DrawsTornApart, [], marks=pytest.mark.slow),
        (PerMicroBatch, []),
        pytest.param(PartialSums, ["layout.cp=2"], marks=pytest.mark.slow),
    ],
)
def test_a_preference_that_is_summed_up_wrongly_is_noticed(pairs, expected, mistake, layout):
    config = configure(pairs, "dpo", LONG, *layout)
    [found, *_] = run_ranks(first_step, config, mistake, processes=config.layout.processes)
    far = differences(found, expected)
    assert max(far["loss"], far["grad_norm"]) > 1e-4, far


def slopes(config: Config) -> list[tuple[float, float]]:
    """The loss's derivative along random directions of the weights, by differences and by gradient, fp64."""
    from llada_megatron.model.provider import build_stage
    from llada_megatron.model.readout import LOGITS
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer

    groups.initialize(config.layout)
    schedule = rules.check(config)
    data = build_trainer(config, schedule).data(0)
    model = build_stage(config).double()
    objective = Preference("preference", config, schedule)
    batch = objective.batch(data, [0, 1], schedule.stages[0])
    batch.inputs.readout = LOGITS  # the others are fp32
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def loss() -> torch.Tensor:  # float64
        cross_entropy = F.cross_entropy(model(batch.inputs), batch.inputs.labels, reduction="none")
        parts = objective.loss(batch, cross_entropy)
        return sum(part / count for part, count in zip(parts.sums, parts.counts, strict=True))

    gradient = torch.autograd.grad(loss(), parameters, materialize_grads=True)
    random, found = torch.Generator().manual_seed(0), []
    for _ in range(3):
        direction = [torch.randn(p.shape, dtype=p.dtype, generator=random) for p in parameters]
        sides = []
        with torch.no_grad():
            for step in (STEP, -2 * STEP):
                for parameter, along in zip(parameters, direction, strict=True):
                    parameter += step * along
                sides.append(float(loss()))
            for parameter, along in zip(parameters, direction, strict=True):
                parameter += STEP * along
        along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True))
        found.append(((sides[0] - sides[1]) / (2 * STEP), float(along)))
    return found


@pytest.mark.parametrize(
    "form", ["dpo", *(pytest.param(form, marks=pytest.mark.slow) for form in ("ipo", "kto"))]
)
def test_the_gradient_by_the_weights_is_that_of_finite_differences(pairs, form):
    """Of a model without experts, whose router is fp32 and chooses."""
    options = [f"preference.form={form}", "preference.label_smoothing=0.1"]
    config = configure(pairs, "dpo", *options, "model.layers=2", "model.dense_layers=2")
    for by_differences, by_gradient in run_ranks(slopes, config)[0]:
        assert by_differences == pytest.approx(by_gradient, rel=2e-7)
