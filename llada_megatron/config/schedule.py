"""Arithmetic of the block-size schedule: token budgets become whole steps."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES, Geometry
from llada_megatron.config.schema import LearningRateAtStart, MomentsAtStart, ScheduleConfig, StageConfig


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
    sequence_length: int
    """L: data tokens of a sample."""
    global_batch: int
    """Samples of each of its steps; of its last ones where a resume changed it."""
    micro_batch: int
    lr: float
    """Its largest learning rate; 0 means optimizer.lr."""
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


@dataclass(frozen=True)
class _Segment:
    """Steps that consume alike, and what was consumed before them."""

    first_step: int
    first_sample: int
    first_token: int
    global_batch: int
    sequence_length: int

    def samples_before(self, step: int) -> int:
        return self.first_sample + (step - self.first_step) * self.global_batch

    def tokens_before(self, step: int) -> int:
        return self.first_token + (step - self.first_step) * self.global_batch * self.sequence_length


class Schedule:
    """The stages of a run on the axis of steps, and which samples each step trains."""

    def __init__(
        self, config: ScheduleConfig, *, sequence_length: int, batches: Batches, micro_batch: int
    ) -> None:
        """Of stages that do not say otherwise: the sequence length, the global batch and the micro-batch.

        batches: more than one when resumes changed the global batch, the present one last. Raises BadInput,
        naming the setting, for a stage that is empty or cannot be cut into blocks.
        """
        if not config.stages:
            raise BadInput("schedule.stages is empty: give at least one stage {name, block_size, tokens}.")
        self.batches = tuple(batches)
        self.stages: list[Stage] = []
        self._segments: list[_Segment] = []
        first_step = 0
        for index, stage in enumerate(config.stages):
            setting = f"schedule.stages[{index}]"
            geometry = OBJECTIVES.get(stage.objective)
            if geometry is None:
                raise BadInput(
                    f"{setting}.objective is {stage.objective}: choose from {', '.join(OBJECTIVES)}."
                )
            length = stage.sequence_length or sequence_length
            block_size = block_size_of(stage.block_size, length, f"{setting}.block_size")
            if geometry.causal and block_size != 1:
                raise BadInput(
                    f"{setting}.block_size is {block_size}: an {stage.objective} stage has blocks of 1."
                )
            end_step = self._lay(first_step, stage, length)
            self.stages.append(
                Stage(
                    index=index,
                    name=stage.name,
                    objective=stage.objective,
                    block_size=block_size,
                    clean_copy=geometry.reads_clean_half and block_size < length,
                    first_step=first_step,
                    end_step=end_step,
                    tokens=self.tokens_before(end_step) - self.tokens_before(first_step),
                    sequence_length=length,
                    global_batch=self._segments[-1].global_batch,
                    micro_batch=stage.micro_batch or micro_batch,
                    lr=stage.lr,
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

    def _lay(self, first_step: int, stage: StageConfig, length: int) -> int:
        """Add the segments of a stage that begins at a step; returns where it ends, after whole steps."""
        batches = [(0, stage.global_batch)] if stage.global_batch else self.batches
        ends = [first for first, _ in batches[1:]] + [None]
        missing = -(-stage.tokens // length)  # samples
        for (_, batch), end in zip(batches, ends, strict=True):
            if missing <= 0 or (end is not None and end <= first_step):
                continue
            segment = _Segment(
                first_step, self.samples_before(first_step), self.tokens_before(first_step), batch, length
            )
            self._segments.append(segment)
            steps = -(-missing // batch)
            steps = steps if end is None else min(steps, end - first_step)
            first_step, missing = first_step + steps, missing - steps * batch
        return first_step

    def _segment_at(self, step: int) -> _Segment:
        starts = [segment.first_step for segment in self._segments]
        return self._segments[max(0, bisect.bisect_right(starts, step) - 1)]

    def samples_before(self, step: int) -> int:
        """Samples that the first `step` steps consume: the global index of the step's first one."""
        return self._segment_at(step).samples_before(step) if step else 0

    def tokens_before(self, step: int) -> int:
        """Data tokens that the first `step` steps consume."""
        return self._segment_at(step).tokens_before(step) if step else 0

    def tokens_of(self, step: int) -> int:
        """Data tokens of a step."""
        return self.tokens_before(step + 1) - self.tokens_before(step)

    def stage_at(self, step: int) -> Stage:
        """The stage that trains `step`; the last one for steps past the end."""
        starts = [stage.first_step for stage in self.stages]
        return self.stages[bisect.bisect_right(starts, step) - 1]

    def first_diffusion_step(self) -> int:
        """Where the embedding noise starts to fade; the total number of steps if nothing is diffusion."""
        return next((s.first_step for s in self.stages if not s.geometry.causal), self.total_steps)
