"""Copies in host memory of what a save writes, so that training may go on meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llada_megatron.runtime import device
from llada_megatron.runtime.host_memory import HostMemory

ALIGNED = 64
"""Bytes: every copy begins at a multiple, whatever its type."""


class Staging:
    """The memory of a run's saves, one at a time: the copies of one are gone with those of the next."""

    def __init__(self) -> None:
        self._memory = HostMemory()

    def copies(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as they are now, each with memory of its own; the device is done when it returns."""
        places = [0]
        for tensor in tensors:
            places.append(places[-1] + -(-tensor.nbytes // ALIGNED) * ALIGNED)
        block, found = self._memory.of(places[-1]), []
        for tensor, at in zip(tensors, places, strict=False):
            if not tensor.numel():
                found.append(torch.empty(tensor.shape, dtype=tensor.dtype))
                continue
            copy = torch.frombuffer(block[at : at + tensor.nbytes], dtype=tensor.dtype).view(tensor.shape)
            copy.copy_(tensor.detach(), non_blocking=True)
            found.append(copy)
        device.synchronize()
        return found
