"""What a decoder keeps: keys and values of all layers, on each process of a layout without pp and cp."""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import LayoutConfig, ModelConfig

BATCH = 8
"""Sequences at hand, as a decoder has them unless it is told otherwise."""


@dataclass(frozen=True)
class Decoding:
    """Bytes of keys and values on each process."""

    bytes_per_token: int
    block_size: int
    """Of the pages, that of the stage."""
    batch: int
    context: int
    """Tokens of a sequence, at most."""
    bytes: int
    """Of `batch` sequences as long as the context, in whole pages, and of one place that belongs to none."""


def decoding_of(stages: list[Stage], cached: int, *, context: int, batch: int = BATCH) -> Decoding | None:
    """What decoding the last stage keeps, at `cached` bytes a token; None for one that fills no masks."""
    stage = stages[-1]
    if stage.geometry.causal:
        return None
    pages = batch * -(-context // stage.block_size)
    size = cached * (pages * stage.block_size + 1)
    return Decoding(cached, stage.block_size, batch, context, size)


def cached_bytes(model: ModelConfig, layout: LayoutConfig, *, b: int) -> int:
    """Of one token: 2 layers (kv_heads / tp) head_dim b, its keys and its values, without pp."""
    return 2 * model.layers * (model.kv_heads // layout.tp) * model.head_dim * b
