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
    """Of one token: what decoding keeps of it in all layers on a rank, times the bytes of a number."""
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
    size = cache_bytes(cached, stage.block_size, context=context, batch=batch)
    return Decoding(cached, stage.block_size, batch, context, size)


def cache_bytes(
    cached: int, block_size: int, *, context: int, batch: int, buffer: int = 1, branches: int = 1
) -> int:
    """Of keys and values on a rank, at `cached` bytes a token, and of one place that belongs to no sequence.

    Each of `batch` sequences has the whole blocks of its context, and `buffer` active blocks for each of its
    `branches` on the rank but one.
    """
    whole = context // block_size
    pages = batch * (whole + (branches - 1) * min(buffer, whole))
    return cached * (pages * block_size + 1)
