"""Builds megatron-core models from a configuration; which model class is used, the family alone knows."""

from __future__ import annotations

import importlib

import torch
from megatron.core.transformer.module import Float16Module

from llada_megatron.attention.registry import Executor
from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import Config
from llada_megatron.model.gpt import BlockDiffusionStage
from llada_megatron.runtime import device


def build_stage(
    config: Config,
    *,
    vp_stage: int | None = None,
    initialize: bool = True,
    attention: Executor | None = None,
) -> BlockDiffusionStage:
    """This rank's (virtual) pipeline stage, on its device, with counter-based initial weights.

    `build_stage` of model/families/FAMILY.py makes it; `attention` takes the place of the executor that
    model.attention_backend names. Raises BadInput for an unknown model.family.
    """
    formulas_of(config.model)
    family = importlib.import_module(f"llada_megatron.model.families.{config.model.family}")
    return family.build_stage(config, vp_stage=vp_stage, initialize=initialize, attention=attention)


def build_model(
    config: Config, *, initialize: bool = True, attention: Executor | None = None
) -> list[torch.nn.Module]:
    """Every virtual stage of this rank, wrapped for bf16 where the precision asks for it."""
    stages: list[torch.nn.Module] = []
    for vp_stage in range(config.layout.vpp):
        interleaved = config.layout.vpp > 1
        stage: torch.nn.Module = build_stage(
            config,
            vp_stage=vp_stage if interleaved else None,
            initialize=initialize,
            attention=attention,
        )
        stage.to(device.device())
        if config.precision.dtype == "bf16":
            stage = Float16Module(stage.config, stage)
        stages.append(stage)
    return stages
