"""Counts what collectives deliver, by watching the operations that torch.distributed really runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class ReceivedBytes(TorchDispatchMode):
    """Inside, `total` adds up the bytes that this rank receives from all-gathers and reduce-scatters.

    A rank's own part is not received. A ring reduce-scatter receives as much as its all-gather: R - 1 times
    the part that it keeps. Other collectives raise NotImplementedError rather than go uncounted.
    """

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name not in ("_allgather_base_", "_reduce_scatter_base_"):
                raise NotImplementedError(f"{name} is not counted")
            output, source = args[0], args[1]
            self.total += abs(_bytes(output) - _bytes(source))
        return func(*args, **(kwargs or {}))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
