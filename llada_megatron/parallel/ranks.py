"""What all ranks tell each other as objects. Without a process group there is one rank."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from llada_megatron.config.errors import Refusal


def rank() -> int:
    """This process's rank among all."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def gathered(mine: Any) -> list[Any]:
    """What every rank gave, in rank order, on every rank; it must be picklable."""
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] = [None] * ranks()
    dist.all_gather_object(parts, mine)
    return parts


def on_first_rank(mine: Any) -> list[Any]:
    """What every rank gave, in rank order, on rank 0 alone; nothing on the others. It must be picklable."""
    if not dist.is_initialized():
        return [mine]
    parts: list[Any] | None = [None] * ranks() if rank() == 0 else None
    dist.gather_object(mine, parts)
    return parts or []


def from_first_rank[T](function: Callable[..., T], *arguments: Any) -> T:
    """What rank 0 finds in the file system, on every rank: the others may see it later than rank 0.

    What rank 0 refuses is raised on every rank.
    """
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [function(*arguments)]
        except Refusal as refusal:
            found = [refusal]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    if isinstance(found[0], Refusal):
        raise found[0]
    return found[0]


def warn(message: str) -> None:
    """Say something once, on the terminal's error stream."""
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)
