"""Which of its node's CPU cores a rank uses: its share of those that some ranks of the node may all use."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from llada_megatron.runtime import device

Offer = tuple[str, tuple[int, ...]]
"""A rank's node, and the CPUs that it may use."""


def offered() -> tuple[int, ...]:
    """The CPUs that this process may use: of those its launcher gave it, those beside its CUDA device."""
    allowed = os.sched_getaffinity(0)
    return tuple(sorted((allowed & _near_device()) or allowed))


def share(offers: Sequence[Offer], rank: int) -> list[int]:
    """The CPUs of one rank, given what each was offered: as many as its rivals get, of whole cores.

    A launcher that has given each rank cores of its own (srun with --cpus-per-task) is taken at its word.
    Where ranks outnumber CPUs each gets one, which others have too.
    """
    rivals = [other for other, offer in enumerate(offers) if offer == offers[rank]]
    cpus = sorted(offers[rank][1], key=lambda cpu: (_core(cpu), cpu))
    place, size = rivals.index(rank), max(1, len(cpus) // len(rivals))
    first = place * size % len(cpus)
    return cpus[first : first + size]


def bind(cpus: Sequence[int]) -> None:
    """Keep this thread, and those that it starts from now on, on these CPUs; where that is forbidden, not."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, cpus)


def _near_device() -> set[int]:
    """The CPUs beside this process's CUDA device, by the kernel's word."""
    address = device.pci_address()
    try:
        return cpu_list(Path(f"/sys/bus/pci/devices/{address}/local_cpulist").read_text())
    except (OSError, ValueError):
        return set()


def _core(cpu: int) -> int:
    """The first CPU of this one's core; two threads of a core are often far apart in number."""
    siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return min(cpu_list(siblings.read_text()))
    except (OSError, ValueError):
        return cpu


def cpu_list(text: str) -> set[int]:
    """The kernel's way to write CPUs: 0-3,8-11."""
    parts = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for first, _, last in parts for cpu in range(int(first), int(last or first) + 1)}
