"""Arithmetic of the block-size schedule: token budgets become whole steps."""

from __future__ import annotations

import bisect
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


class Schedule:
    """The stages of a run on the axis of steps."""

    def __init__(
        self, config: ScheduleConfig, *, sequence_length: int, global_batch: int, micro_batch: int
    ) -> None:
        """Raises BadInput, naming the setting, for a stage that is empty or cannot be cut into blocks."""
        if not config.stages:
            raise BadInput("schedule.stages is empty: give at least one stage {name, block_size, tokens}.")
        self.tokens_per_step = sequence_length * global_batch
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
            steps = -(-stage.tokens // self.tokens_per_step)
            self.stages.append(
                Stage(
                    index=index,
                    name=stage.name,
                    objective=stage.objective,
                    block_size=block_size,
                    clean_copy=geometry.reads_clean_half and block_size < sequence_length,
                    first_step=first_step,
                    end_step=first_step + steps,
                    tokens=steps * self.tokens_per_step,
                    micro_batch=stage.micro_batch or micro_batch,
                    learning_rate=stage.learning_rate,
                    moments=stage.moments,
                )
            )
            first_step += steps
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise BadInput(f"schedule.stages has a name twice in {names}: reports tell stages apart by name.")
        self.total_steps = first_step
        self.total_tokens = first_step * self.tokens_per_step

    def stage_at(self, step: int) -> Stage:
        """The stage that trains `step`; the last one for steps past the end."""
        starts = [stage.first_step for stage in self.stages]
        return self.stages[bisect.bisect_right(starts, step) - 1]

    def first_diffusion_step(self) -> int:
        """Where the embedding noise starts to fade; the total number of steps if nothing is diffusion."""
        return next((s.first_step for s in self.stages if not s.geometry.causal), self.total_steps)
