"""Host memory that the device copies into while the host goes on."""

from __future__ import annotations

import sys

import numpy
import torch

from llada_megatron.runtime.device import on_cuda


class HostMemory:
    """One block of bytes, pinned on CUDA, that is kept and made anew only when more is wanted.

    Fresh pages cost more than the copy into them. torch's own pinned memory comes in powers of two, up to
    twice of what is wanted, so the block is registered with CUDA by its exact size; where CUDA refuses, it
    stays pageable, with a warning, and copies wait.
    """

    def __init__(self) -> None:
        self._block = numpy.empty(0, numpy.uint8)
        self._is_pinned = False

    def of(self, size: int) -> numpy.ndarray:
        """At least `size` bytes; what the block held before is gone."""
        if self._block.nbytes < size:
            self._release()
            self._block = numpy.empty(size, numpy.uint8)
            if on_cuda():
                refused = int(torch.cuda.cudart().cudaHostRegister(self._block.ctypes.data, size, 0))
                self._is_pinned = not refused
                if refused:
                    print(
                        f"warning: CUDA pins no {size:,} bytes (error {refused}): saves wait for copies.",
                        file=sys.stderr,
                        flush=True,
                    )
        return self._block

    def _release(self) -> None:
        if self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._block.ctypes.data)
            self._is_pinned = False
        self._block = numpy.empty(0, numpy.uint8)
