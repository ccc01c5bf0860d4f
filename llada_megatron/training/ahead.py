"""Micro-batches of a step, built by a thread one ahead of the model and once for all virtual stages."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor

from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.runtime import device


def builder() -> ThreadPoolExecutor:
    """The thread that builds; on CUDA it allocates pinned memory beside this process's device."""
    return ThreadPoolExecutor(1, "build ahead", initializer=device.share(device.device()))


class Ahead:
    """`count` batches of an iterator, for several readers that each want all of them in their order.

    A batch is kept until its last reader has it: interleaved virtual stages take the same one at different
    times, and without them one batch waits while the model has the one before.
    """

    def __init__(self, batches: Iterator[MicroBatch], count: int, readers: int, thread: Executor) -> None:
        self._batches, self._count, self._readers, self._thread = batches, count, readers, thread
        self._building: list[Future[MicroBatch]] = []
        self._wanted_by: list[int] = []

    def reader(self) -> Iterator[MicroBatch]:
        """All batches; none is held here after its last reader has it."""
        for index in range(self._count):
            yield self._take(index)

    def _take(self, index: int) -> MicroBatch:
        while len(self._building) < min(index + 2, self._count):
            self._building.append(self._thread.submit(self._build))
            self._wanted_by.append(self._readers)
        batch = self._building[index].result()
        self._wanted_by[index] -= 1
        if not self._wanted_by[index]:
            self._building[index] = Future()
        return batch

    def _build(self) -> MicroBatch:
        batch = next(self._batches)
        return batch.packed() if device.on_cuda() else batch
