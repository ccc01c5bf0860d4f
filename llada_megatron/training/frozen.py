"""Which parameters a run trains: adapters where there are any, and nothing that training.freeze names."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.model.adapters import is_adapter
from llada_megatron.model.initialize import named_parameters
from llada_megatron.parallel.ranks import gathered


def freeze(config: Config, stages: Sequence[torch.nn.Module]) -> None:
    """Take the gradients from what stays as it is, before buffers are made for them; every rank calls it.

    Raises BadInput for a pattern that no parameter of the model has, and where nothing would be trained.
    """
    patterns, has_adapters = config.training.freeze, config.model.lora.rank > 0
    if not patterns and not has_adapters:
        return
    used, trained = set(), False
    for stage in stages:
        for name, parameter in named_parameters(stage):
            matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
            used.update(matching)
            if matching or (has_adapters and not is_adapter(name)):
                parameter.requires_grad_(False)
            trained |= parameter.requires_grad
    if not patterns:
        return
    everywhere = gathered((used, trained))
    if unused := [pattern for pattern in patterns if not any(pattern in used for used, _ in everywhere)]:
        raise BadInput(
            f"training.freeze: no parameter is called {unused[0]}; names are those of a checkpoint, such as"
            " decoder.layers.0.mlp.router.weight, and * stands for anything."
        )
    if not any(trained for _, trained in everywhere):
        raise BadInput("training.freeze leaves nothing to train: name fewer parameters.")
