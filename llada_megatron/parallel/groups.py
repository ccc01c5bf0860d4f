"""megatron-core's process groups, made from a layout."""

from __future__ import annotations

import datetime
import itertools
import os
from collections.abc import Iterator

import torch.distributed as dist

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.parallel.ranks import gathered
from llada_megatron.runtime import cores, device, mcore_cpu
from llada_megatron.runtime.launch import node

mcore_cpu.install()  # before the first import of megatron.core

from megatron.core import parallel_state, tensor_parallel  # noqa: E402

TIMEOUT_SEC = 600.0
"""Of a message where no setting says another one."""


def join(
    layout: LayoutConfig, *, threads: int = 1, bind: bool = False, timeout_sec: float = TIMEOUT_SEC
) -> None:
    """Join the process group of RANK and WORLD_SIZE, of all processes.

    threads: CPU threads of this rank; 0: its share of its node's cores (runtime/cores.py), which it keeps to
    where `bind` says so and it has a CUDA device. timeout_sec: how long a message may take. Raises BadInput
    when the number of processes is not layout.processes.

    torch is not told the device: it would make each of the layout's groups by a call of ncclCommSplit on all
    ranks, members or not (distributed_c10d.py:2704), and make them before any is needed (docs/cluster.md).
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if world != layout.processes:
        raise BadInput(
            f"layout.processes={layout.processes} but {world} processes were started: make them the same."
        )
    device.bind(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        device.backend(),
        store=_next_store(rank, world, timeout_sec),
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout_sec),
    )
    own = cores.share(gathered((node(), cores.offered())), rank)
    if bind and device.on_cuda():
        cores.bind(own)
    device.use_threads(threads or len(own))


def initialize(layout: LayoutConfig, *, threads: int = 1, timeout_sec: float = TIMEOUT_SEC) -> None:
    """Build every group of the layout, after joining all processes unless `join` already did.

    timeout_sec: of the messages of every group, that of all processes included.
    """
    if not dist.is_initialized():
        join(layout, threads=threads, timeout_sec=timeout_sec)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,  # nothing of ours speaks over them, and each waits for every rank
        distributed_timeout_minutes=timeout_sec / 60,  # type: ignore[arg-type] # a timedelta takes it
    )
    _make_branch_groups(layout)
    # megatron-core wants its tracker seeded; nothing here draws from it (weights are counter-based).
    tensor_parallel.model_parallel_cuda_manual_seed(1)


_branch_group: dist.ProcessGroup | None = None


def _make_branch_groups(layout: LayoutConfig) -> None:
    """Groups of layout.bp replicas of the model that decode the same sequences: neighbours among the ranks of
    data parallelism, in layouts with pp and cp 1.
    """
    global _branch_group
    _branch_group = None
    if layout.bp > 1:
        tp, together = layout.tp, layout.tp * layout.bp
        of_ranks = [
            [first + rank + branch * tp for branch in range(layout.bp)]
            for first in range(0, layout.processes, together)
            for rank in range(tp)
        ]
        _branch_group, _ = dist.new_subgroups_by_enumeration(of_ranks)


def branch_parallel() -> tuple[dist.ProcessGroup | None, int, int]:
    """This rank's group of layout.bp, its rank there, and its size; None, 0 and 1 where nobody shares."""
    if _branch_group is None:
        return None, 0, 1
    return _branch_group, dist.get_rank(_branch_group), dist.get_world_size(_branch_group)


def wait_longer(timeout_sec: float) -> None:
    """Let messages of all processes together take so long; `initialize` is told for other groups."""
    dist.set_timeout(datetime.timedelta(seconds=timeout_sec))


_stores: Iterator[dist.Store] | None = None


def _next_store(rank: int, world: int, timeout_sec: float) -> dist.Store:
    """A store for one life of the process group.

    The same processes may build one layout after another: they meet once, in a file when runtime/launch.py
    started them and else where torchrun or srun says, and each life of the group has keys of its own.
    """
    global _stores
    if world == 1:
        return dist.HashStore()  # needs no address
    if _stores is None:
        shared: dist.Store
        if file := os.environ.get("LLADA_STORE"):
            shared = dist.FileStore(file, world)
        else:
            shared, _, _ = next(dist.rendezvous("env://", rank, world))
        shared.set_timeout(datetime.timedelta(seconds=timeout_sec))
        _stores = (dist.PrefixStore(f"life_{number}", shared) for number in itertools.count())
    return next(_stores)


def destroy() -> None:
    """Leave every group, so that the process can build another layout."""
    global _branch_group
    _branch_group = None
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
