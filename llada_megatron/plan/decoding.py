"""What a decoder keeps: keys and values of all layers, on each process of a layout without pp and cp."""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.config.schedule import Stage

BATCH = 8
"""Sequences at hand, as a decoder has them unless it is told otherwise."""


@dataclass(frozen=True)
class Decoding:
    """Bytes of keys and values on each process."""

    cached_token_bytes: int
    """Of one token: 2 layers (kv_heads / tp) head_dim and the bytes of a number."""
    block_size: int
    """Of the pages, that of the stage."""
    batch: int
    context: int
    """Tokens of a sequence, at most."""
    bytes: int
    """Of `batch` sequences of the context's whole blocks, and of one place that belongs to none."""


def decoding_of(stages: list[Stage], cached: int, *, context: int, batch: int = BATCH) -> Decoding | None:
    """What decoding the last stage keeps, at `cached` bytes a token; None for one that fills no masks."""
    stage = stages[-1]
    if stage.geometry.causal:
        return None
    pages = batch * (context // stage.block_size)
    size = cached * (pages * stage.block_size + 1)
    return Decoding(cached, stage.block_size, batch, context, size)
