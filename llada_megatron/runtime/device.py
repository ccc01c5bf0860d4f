"""Device, backend and dtype of this process; the only room that mentions torch.cuda."""

from __future__ import annotations

import os
import platform
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import psutil
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def on_cuda() -> bool:
    """Whether this machine has a CUDA device that torch can use."""
    return torch.cuda.is_available() and torch.version.cuda is not None


def device() -> torch.device:
    """The device of this process: the current CUDA device, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda() else torch.device("cpu")


def architecture(device: torch.device) -> str:
    """`sm_90` and the like for a CUDA device; else its type in capitals, `CPU`."""
    if device.type != "cuda":
        return device.type.upper()
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def stream(device: torch.device) -> int:
    """The address of the current stream of a CUDA device, as libraries take it."""
    return torch.cuda.current_stream(device).cuda_stream


def backend() -> str:
    """The collective backend: `nccl` on CUDA, `gloo` on a CPU."""
    return "nccl" if on_cuda() else "gloo"


def bind(local_rank: int) -> None:
    """Bind this process to its device."""
    if on_cuda():
        torch.cuda.set_device(local_rank)


def share(of: torch.device) -> Callable[[], None]:
    """What another thread of this process calls first, so that it uses the same device and no other."""

    def use() -> None:
        if of.type == "cuda":
            torch.cuda.set_device(of)

    return use


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in memory that a CUDA device copies from while the host goes on; itself on a CPU."""
    return tensor.pin_memory() if on_cuda() else tensor


def empty_pinned(size: int) -> torch.Tensor:
    """uint8 [size] of such memory, without values."""
    return torch.empty(size, dtype=torch.uint8, pin_memory=on_cuda())


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor of this host on a device, which copies it while the host goes on."""
    return pinned(tensor).to(device, non_blocking=True)


def use_threads(count: int) -> None:
    """Let one operation of this process use so many CPU threads."""
    torch.set_num_threads(count)


def threads() -> int:
    """CPU threads of one of this process's operations."""
    return torch.get_num_threads()


def pci_address() -> str:
    """Of this process's CUDA device, as the kernel writes it; empty where there is none."""
    if not on_cuda():
        return ""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return f"{found.pci_domain_id:04x}:{found.pci_bus_id:02x}:{found.pci_device_id:02x}.0"


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed the ambient generators; nothing that training computes reads them, libraries might.

    Deterministic kernels on CUDA: torch's where it has them, cuBLAS's, and one order of adding for NCCL, of
    which Megatron vouches for Ring (megatron/training/determinism.py). torch would also fill all memory that
    is taken with NaN; that costs a pass over every buffer and shows errors alone, so it is off.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic and on_cuda():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False


def synchronize() -> None:
    """Wait until the device has done what was asked of it; nothing to wait for on a CPU."""
    if on_cuda():
        torch.cuda.synchronize()


def seconds() -> float:
    """A clock in seconds that has waited for the device."""
    synchronize()
    return time.perf_counter()


def timed[T](function: Callable[[], T]) -> tuple[T, float]:
    """A call's result and its seconds: of the device by events, on a CPU the process's own CPU time."""
    if on_cuda():
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = function()
        stop.record()
        stop.synchronize()
        return result, start.elapsed_time(stop) / 1e3
    began = time.process_time()
    result = function()
    return result, time.process_time() - began


def capture[T](function: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """A CUDA graph of a call: its result, and what computes the result anew from what its inputs then hold.

    The call runs a few times before, for whatever is made when it is first needed. Raises RuntimeError where
    the call waits for the device, as for a number that the host reads.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Of other threads, NCCL's watchdog asks for events meanwhile.
    with torch.cuda.graph(graph, pool=_graph_memory(), capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


@cache
def _graph_memory() -> Any:
    """One pool for all graphs: they run one after the other."""
    return torch.cuda.graph_pool_handle()


def peak_memory_bytes() -> int:
    """Peak memory of this process: allocated on the CUDA device, or resident on a CPU."""
    if on_cuda():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reserved_memory_bytes() -> int | None:
    """What torch holds of the CUDA device's memory, used or not; None on a CPU."""
    return torch.cuda.memory_reserved() if on_cuda() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that this process, or its device, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(
        error
    )  # of torch's allocator on a CPU, of C++, of CUDA's libraries: without a class of their own
    return any(each in said for each in ("can't allocate memory", "std::bad_alloc", "out of memory"))


def record_memory() -> None:
    """From now on keep the stack of every allocation on the CUDA device, for `write_memory_snapshot`."""
    if on_cuda():
        torch.cuda.memory._record_memory_history(max_entries=100_000, stacks="python")


def write_memory_snapshot(path: Path) -> bool:
    """Write what lies where in the CUDA device's memory; False where nothing was written, as on a CPU."""
    if not on_cuda():
        return False
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError):
        return False
    return True


def peak_bytes_of(function: Callable[[], object]) -> int:
    """Peak memory of a call over what was in use before: allocated on the CUDA device, or resident on a CPU.

    On a CPU what the process held at its earlier peak counts too: measure in a fresh process.
    """
    if on_cuda():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = psutil.Process().memory_info().rss
    function()
    return peak_memory_bytes() - before


def name() -> str:
    """The CUDA device's name, or the CPU's architecture and the threads that torch uses."""
    if on_cuda():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {threads()} thread{'s' if threads() > 1 else ''}"


def names() -> dict[str, int]:
    """The CUDA devices that torch can use, by name and memory, and how many there are of each."""
    if not on_cuda():
        return {}
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return dict(Counter(f"{device.name}, {device.total_memory / 1e9:.0f} GB" for device in found))


def cuda_version() -> str:
    """That torch was built for, empty when for none."""
    return torch.version.cuda or ""


def nccl_version() -> str:
    """Of the nccl in torch, whose build must have one."""
    return ".".join(map(str, torch.cuda.nccl.version()))


def cudnn_version() -> str:
    """Of the cuDNN that torch brings, empty where it brings none."""
    version = torch.backends.cudnn.version()
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else ""
