"""What this process computes in a while, operator by operator: torch's profiler, and ranges for nsys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from llada_megatron.runtime import device


class Profiler:
    """From `start` to `stop`; both wait for the device.

    ranges_alone: CUPTI serves one reader at a time, so where `nsys` has it torch must leave it alone. Then
    there are only NVTX ranges, between cudaProfilerStart and cudaProfilerStop.
    """

    def __init__(self, *, ranges_alone: bool) -> None:
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.on_cuda():
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        self._profile = None if ranges_alone else torch.profiler.profile(activities=kinds)

    def start(self) -> None:
        """Begin to record."""
        device.synchronize()
        if device.on_cuda():
            torch.cuda.profiler.start()
        if self._profile is not None:
            self._profile.start()

    def stop(self) -> None:
        """End what `start` began."""
        device.synchronize()
        if self._profile is not None:
            self._profile.stop()
        if device.on_cuda():
            torch.cuda.profiler.stop()

    def write_trace(self, path: Path) -> None:
        """Write what was recorded in Chrome's format, compressed where the name ends with .gz."""
        if self._profile is not None:
            self._profile.export_chrome_trace(str(path))

    def operators(self) -> list[dict[str, Any]]:
        """Name, calls and milliseconds of each operator, the most expensive first.

        Without the operators that it calls; of the device's time on CUDA, else of the CPU's.
        """
        if self._profile is None:
            return []
        time_of = "self_device_time_total" if device.on_cuda() else "self_cpu_time_total"
        found = [
            {"name": each.key, "calls": each.count, "ms": getattr(each, time_of) / 1e3}
            for each in self._profile.key_averages()
        ]
        return sorted(found, key=lambda each: -each["ms"])


@contextmanager
def marked(name: str) -> Iterator[None]:
    """A part of the step, as a range of that name in both."""
    nvtx = torch.cuda.nvtx.range(name) if device.on_cuda() else nullcontext()
    with torch.profiler.record_function(name), nvtx:
        yield
