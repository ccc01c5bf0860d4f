"""What a stage says for itself in the place of the run, and the stages in a row that read the same data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, DataConfig, DiffusionConfig, ModelConfig, StageConfig


def data_of(data: DataConfig, stage: StageConfig) -> DataConfig:
    """What a stage reads."""
    return replace(
        data,
        sequence_length=stage.sequence_length or data.sequence_length,
        path=stage.path or data.path,
        weights=stage.weights or ([] if stage.path else data.weights),
    )


def model_of(model: ModelConfig, stage: StageConfig) -> ModelConfig:
    """The model in a stage: its frequencies may be its own."""
    return replace(
        model,
        rotary_base=stage.rotary_base or model.rotary_base,
        rotary_scaling=stage.rotary_scaling or model.rotary_scaling,
    )


def diffusion_of(diffusion: DiffusionConfig, stage: StageConfig) -> DiffusionConfig:
    """The objective in a stage: its mask rates may be its own."""
    return replace(
        diffusion,
        mask_rate_min=stage.mask_rate_min or diffusion.mask_rate_min,
        mask_rate_max=stage.mask_rate_max or diffusion.mask_rate_max,
    )


def at_stage(config: Config, index: int) -> Config:
    """The run as it is in one of its stages."""
    stage = config.schedule.stages[index]
    return replace(
        config,
        data=data_of(config.data, stage),
        model=model_of(config.model, stage),
        diffusion=diffusion_of(config.diffusion, stage),
        optimizer=replace(config.optimizer, lr=stage.lr or config.optimizer.lr),
        layout=replace(
            config.layout,
            micro_batch=stage.micro_batch or config.layout.micro_batch,
            global_batch=stage.global_batch or config.layout.global_batch,
        ),
    )


@dataclass(frozen=True)
class Phase:
    """Steps that read one mixture at one L, sequence after sequence."""

    data: DataConfig
    stages: tuple[str, ...]
    first_step: int
    end_step: int
    first_sequence: int
    """The global index of its first sequence: sample i reads sequence i // samples_per_sequence."""
    samples_per_sequence: int


def phases_of(config: Config, schedule: Schedule) -> list[Phase]:
    """The phases of a run, in their order."""
    phases: list[Phase] = []
    for stage in schedule.stages:
        data = data_of(config.data, config.schedule.stages[stage.index])
        each = stage.geometry.samples_per_sequence(config)
        if phases and (phases[-1].data, phases[-1].samples_per_sequence) == (data, each):
            stages = (*phases[-1].stages, stage.name)
            phases[-1] = replace(phases[-1], stages=stages, end_step=stage.end_step)
        else:
            first = schedule.samples_before(stage.first_step) // each
            phases.append(Phase(data, (stage.name,), stage.first_step, stage.end_step, first, each))
    return phases
