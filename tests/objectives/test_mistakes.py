"""Mistakes that SFT and CAP must not make, each handed to the step in the place of the stage's objective.

Those of a preference are in test_one_model.py. What a comparison finds of the right objective, it must not
find of a wrong one.
"""

from typing import Any

import pytest
import torch

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import build_sequences
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.confidence import Confidence
from llada_megatron.objectives.corruption import Corruption, corrupt
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.objective import Loss, Objective
from tests.distributed import run_ranks
from tests.objectives.conversations import OBJECTIVES, configure, write


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("chats"), "chat")


def first_step(config: Config, objective: type[Objective]) -> tuple[float, float]:
    """Loss and norm of the first step."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    groups.initialize(config.layout)
    schedule = rules.check(config)
    trainer = build_trainer(config, schedule)
    name = schedule.stages[0].objective
    trainer.objectives = {name: objective(name, config, schedule)}
    step = train_step(trainer, 0)
    return step.loss, step.grad_norm


class PerMicroBatch(Diffusion):
    """The mean of the micro-batches' means."""

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        whole = super().loss(batch, output)
        return Loss([whole.sums[0] / batch.counts[0]], [1], whole.figures)


class RightPerMicroBatch(Confidence):
    """The entropies' mean over what is right in a micro-batch; the diffusion loss over the global batch."""

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        whole = super().loss(batch, output)
        mean = whole.sums[1] / whole.counts[1].clamp(min=1)
        return Loss([whole.sums[0], mean], [whole.counts[0], 1], whole.figures)


@pytest.mark.parametrize(
    ("name", "objective", "is_right"),
    [
        pytest.param("sft", Diffusion, True, marks=pytest.mark.slow),
        pytest.param("sft", PerMicroBatch, False, marks=pytest.mark.slow),
        ("cap", Confidence, True),
        ("cap", RightPerMicroBatch, False),
    ],
)
def test_the_denominator_is_that_of_the_global_batch(chats, name, objective, is_right):
    found = [
        run_ranks(first_step, configure(chats, name, f"layout.micro_batch={size}"), objective)[0]
        for size in (2, 8)
    ]
    far = max(abs(a - b) / abs(b) for a, b in zip(*found, strict=True))
    assert (far < 1e-5) == is_right and (far > 1e-3) != is_right, far


def prompts_masked(*arguments: Any) -> Corruption:
    """As `corrupt`, of the prompts too: without its last argument, what is supervised."""
    return corrupt(*arguments[:-1])


class PromptsMasked(Diffusion):
    corrupt = staticmethod(prompts_masked)


@pytest.mark.parametrize(("name", "objective"), [("sft", Diffusion), ("cap", Confidence)])
def test_prompts_and_tails_are_never_asked_for(chats, name, objective):
    config = configure(chats, name)
    assert asked_outside_answers(config, objective) == 0
    assert asked_outside_answers(config, PromptsMasked) > 0


def asked_outside_answers(config: Config, objective: type[Diffusion]) -> int:
    """Tokens that are no answer and that a pair of views masks and predicts."""
    schedule = rules.schedule_of(config)
    data = build_sequences(
        config.data,
        split="train",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
    )
    made = objective(OBJECTIVES["sft"], config, schedule)
    sample = data[0]
    batch = made.batch({0: sample}, [0, 1], schedule.stages[0])
    asked = torch.bincount(batch.inputs.outputs // 2, minlength=len(sample.tokens)).numpy()
    assert batch.counts == (2 * int(sample.supervised.sum()),)
    assert (asked[sample.supervised] == 1).all()  # the two views of a pair score each answer's token once
    assert batch.inputs.labels is not None and len(batch.inputs.labels) == asked.sum()
    return int(asked[~sample.supervised].sum())
