"""Arithmetic of the block-size schedule: token budgets become whole steps."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES, Geometry
from llada_megatron.config.schema import LearningRateAtStart, MomentsAtStart, ScheduleConfig


@dataclass(frozen=True)
class Stage:
    """A stage with its budget rounded up to whole steps; it covers steps [first_step, end_step)."""

    index: int
    name: str
    objective: str
    """A name of OBJECTIVES."""
    block_size: int
    """Tokens of a block; L for MDLM, 1 where the objective is causal."""
    clean_copy: bool
    """True where the model reads `[x_t ; x_0]` (2L tokens), False where it reads L tokens."""
    first_step: int
    end_step: int
    tokens: int
    """Data tokens that the stage really consumes."""
    micro_batch: int
    learning_rate: LearningRateAtStart
    moments: MomentsAtStart

    @property
    def steps(self) -> int:
        return self.end_step - self.first_step

    @property
    def geometry(self) -> Geometry:
        """What its objective makes of a sequence."""
        return OBJECTIVES[self.objective]

    @property
    def rows_per_token(self) -> int:
        """Rows of the model for each data token: noisy ones, and clean ones beside them."""
        return 2 if self.clean_copy else 1


def block_size_of(text: str, sequence_length: int, setting: str) -> int:
    """Tokens of a block from `full` or a number that divides L; BadInput names `setting`."""
    if text == "full":
        return sequence_length
    try:
        block_size = int(text)
    except ValueError:
        raise BadInput(f"{setting} is '{text}': give a number of tokens or 'full'.") from None
    if block_size < 1 or sequence_length % block_size:
        raise BadInput(
            f"{setting} is {block_size}, which does not divide data.sequence_length={sequence_length}:"
            " choose a divisor, or 'full'."
        )
    return block_size


Batches = Sequence[tuple[int, int]]
"""(first step, samples of each step from there on), in the order of the steps, which begin with 0."""


class Schedule:
    """The stages of a run on the axis of steps, and which samples each step trains."""

    def __init__(
        self, config: ScheduleConfig, *, sequence_length: int, batches: Batches, micro_batch: int
    ) -> None:
        """batches: more than one when resumes changed the global batch, the present one last.

        Raises BadInput, naming the setting, for a stage that is empty or cannot be cut into blocks.
        """
        if not config.stages:
            raise BadInput("schedule.stages is empty: give at least one stage {name, block_size, tokens}.")
        self.batches = tuple(batches)
        self.sequence_length = sequence_length
        self.stages: list[Stage] = []
        first_step = 0
        for index, stage in enumerate(config.stages):
            setting = f"schedule.stages[{index}]"
            geometry = OBJECTIVES.get(stage.objective)
            if geometry is None:
                raise BadInput(
                    f"{setting}.objective is {stage.objective}: choose from {', '.join(OBJECTIVES)}."
                )
            block_size = block_size_of(stage.block_size, sequence_length, f"{setting}.block_size")
            if geometry.causal and block_size != 1:
                raise BadInput(
                    f"{setting}.block_size is {block_size}: an {stage.objective} stage has blocks of 1."
                )
            wanted = self.samples_before(first_step) + -(-stage.tokens // sequence_length)
            end_step = self._first_step_with(wanted)
            self.stages.append(
                Stage(
                    index=index,
                    name=stage.name,
                    objective=stage.objective,
                    block_size=block_size,
                    clean_copy=geometry.reads_clean_half and block_size < sequence_length,
                    first_step=first_step,
                    end_step=end_step,
                    tokens=self.tokens_before(end_step) - self.tokens_before(first_step),
                    micro_batch=stage.micro_batch or micro_batch,
                    learning_rate=stage.learning_rate,
                    moments=stage.moments,
                )
            )
            first_step = end_step
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise BadInput(f"schedule.stages has a name twice in {names}: reports tell stages apart by name.")
        self.total_steps = first_step
        self.total_samples = self.samples_before(self.total_steps)
        self.total_tokens = self.tokens_before(self.total_steps)

    @property
    def tokens_per_step(self) -> int:
        """Data tokens of a step with the present global batch."""
        return self.batches[-1][1] * self.sequence_length

    def samples_before(self, step: int) -> int:
        """Samples that the first `step` steps consume: the global index of the step's first one."""
        ends = [first for first, _ in self.batches[1:]] + [step]
        parts = zip(self.batches, ends, strict=True)
        return sum(max(0, min(step, end) - first) * batch for (first, batch), end in parts)

    def tokens_before(self, step: int) -> int:
        """Data tokens that the first `step` steps consume."""
        return self.samples_before(step) * self.sequence_length

    def _first_step_with(self, samples: int) -> int:
        """The least number of steps that consume at least so many samples, one or more."""
        for first, batch in reversed(self.batches):
            if (missing := samples - self.samples_before(first)) > 0:
                return first + -(-missing // batch)
        raise ValueError(f"samples is {samples}")

    def stage_at(self, step: int) -> Stage:
        """The stage that trains `step`; the last one for steps past the end."""
        starts = [stage.first_step for stage in self.stages]
        return self.stages[bisect.bisect_right(starts, step) - 1]

    def first_diffusion_step(self) -> int:
        """Where the embedding noise starts to fade; the total number of steps if nothing is diffusion."""
        return next((s.first_step for s in self.stages if not s.geometry.causal), self.total_steps)
