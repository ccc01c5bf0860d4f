"""A checkpoint's model for inference: any layout, no optimizer, no gradient buffers."""

from __future__ import annotations

from pathlib import Path

import torch

from llada_megatron.checkpoint import store
from llada_megatron.config.schema import Config
from llada_megatron.model.provider import build_model


def load_model(config: Config, checkpoint: Path) -> list[torch.nn.Module]:
    """Every virtual stage of this rank with a checkpoint's weights, in eval mode, without gradients.

    The process groups of config.layout exist already; it need not be the layout that saved. Raises BadInput
    naming the checkpoint when it does not fit the model.
    """
    stages = build_model(config, initialize=False)
    store.load(checkpoint, stages, None)
    for stage in stages:
        stage.eval().requires_grad_(False)
    return stages
