"""What a start asks of this machine before it builds a model; `llada train --check` asks it too."""

from __future__ import annotations

from llada_megatron.attention import select_backend
from llada_megatron.config.schema import Config
from llada_megatron.model.specs import resolve_layer_spec
from llada_megatron.runtime import device


def attention_line(config: Config) -> str:
    """Which executor of attention a run uses here and why not a faster one; BadInput when it cannot."""
    _, line = select_backend(
        config.model.attention_backend,
        device.device(),
        device.DTYPES[config.precision.dtype],
        config.model.head_dim,
    )
    return line


def check_layers(config: Config) -> None:
    """Raise BadInput where model.layer_spec cannot be served: a package is missing, or it has no adapters."""
    resolve_layer_spec(config.model)
