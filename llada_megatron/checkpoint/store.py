"""Save and load a run's weights and optimizer: megatron-core's format and its sharing out over ranks.

Every data-parallel rank holds the same weights and another run of the optimizer's state. megatron-core's
FullyParallel wrappers deal the weights out, to be written and to be read, each byte by one rank of a group;
the optimizer's parts are dealt out already (moments.py). Weights and training state lie in separate files.
"""

from __future__ import annotations

import errno
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME as FORMAT
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from llada_megatron.checkpoint import moments, publish
from llada_megatron.checkpoint.average import WeightAverage
from llada_megatron.checkpoint.shards import (
    Part,
    ShardsReader,
    Written,
    require_whole,
    write_index,
    write_parts,
)
from llada_megatron.checkpoint.staging import Staging
from llada_megatron.config.errors import BadInput, Refusal
from llada_megatron.model.initialize import SHARDING_METADATA
from llada_megatron.parallel.ranks import from_first_rank, on_first_rank
from llada_megatron.record import carried
from llada_megatron.record.json_files import read_json
from llada_megatron.record.manifest import Checkpoint, Manifest
from llada_megatron.record.run_dir import EMA, OPTIMIZER, SHARDS
from llada_megatron.runtime import device, unpickling

STEP = "step"
"""Of Adam, in what the optimizer's files hold beside tensors."""
REMEDY = "take another checkpoint"
type Parts = list[tuple[Part, torch.Tensor]]


class Saver:
    """What the saves of a run share: threads, host memory, and which rank writes which weights."""

    def __init__(self, *, threads: int, in_background: bool) -> None:
        """threads: files that each rank writes at the same time."""
        self.threads, self.in_background = threads, in_background
        self._staging = Staging()
        self._sharing = FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy(), _replicas(), do_cache_distribution=True
        )

    def save(
        self,
        final: Path,
        manifest: Manifest,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        *,
        carried_along: Mapping[str, bytes],
        average: WeightAverage | None = None,
        made_by: Callable[..., Save] | None = None,
    ) -> Save:
        """Begin a checkpoint, once the one before it is published; every rank calls it.

        carried_along: files of the checkpoint's `hf/` by name; the first rank's are written. made_by: makes
        another Save than one to the disk. Raises OSError where the disk has no room.
        """
        for chunk in model:
            if chunk.ddp_config.overlap_param_gather:  # the next forward would gather what the optimizer left
                chunk.start_param_sync(force_sync=True)
        sharded = sharded_model(model)
        contents = {SHARDS: _Content(common={} if dist.get_rank() == 0 else None)}
        if optimizer is not None:
            step = {STEP: _adam_step_of(optimizer)} if dist.get_rank() == 0 else None
            held = [each for each in moments.held_here(sharded, optimizer) if each.is_saved]
            contents[OPTIMIZER] = _Content([(each.part, each.values) for each in held], step)
        if average is not None:
            averaged = [each for each in average.held_here(sharded) if each.is_saved]
            common: dict[str, Any] | None = {} if dist.get_rank() == 0 else None
            contents[EMA] = _Content([(each.part, each.values) for each in averaged], common)
        contents[SHARDS].parts = self._own_weights(sharded)
        if made_by is None:
            _require_space(final.parent, contents)
        return (made_by or Save)(final, manifest, self._captured(contents), carried_along, self.threads)

    def _own_weights(self, sharded: dict[str, Any]) -> Parts:
        """The parts of the weights that this rank writes; `sharded` is changed."""
        state, _ = save_preprocess(sharded, validate_access_integrity=False)
        self._sharing.apply_saving_parallelization(state)
        shards = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
        return [_part_of(shard) for shard in shards if is_main_replica(shard.replica_id)]

    def _captured(self, contents: dict[str, _Content]) -> dict[str, _Content]:
        """The same in host memory; a foreground save on a CPU writes what lies there already."""
        if not self.in_background and not device.on_cuda():
            return contents
        tensors = [values for content in contents.values() for _, values in content.parts]
        copies = iter(self._staging.copies(tensors))
        return {
            name: _Content([(part, next(copies)) for part, _ in content.parts], content.common)
            for name, content in contents.items()
        }


@dataclass
class _Content:
    """What this rank writes into one directory of a checkpoint."""

    parts: Parts = field(default_factory=list)
    common: dict[str, Any] | None = None


class Save:
    """One checkpoint on its way: captured when made, written by a thread, published by `publish`.

    Every rank makes it and calls each method. Raises OSError naming the path when it cannot be written; what
    was published before stays whole.
    """

    def __init__(
        self,
        final: Path,
        manifest: Manifest,
        contents: dict[str, _Content],
        carried_along: Mapping[str, bytes],
        threads: int,
    ) -> None:
        self.final, self.manifest = final, manifest
        self._contents, self._carried_along, self._threads = contents, carried_along, threads
        self._aside = self._begin()
        self._written: dict[str, Written] | str = "the writer ended early"
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _begin(self) -> Path:
        """Make the directory to write into; every rank may write when it returns."""
        aside = publish.begin(self.final)
        if dist.get_rank() == 0:
            for name in self._contents:
                (aside / name).mkdir()
            carried.write(self._carried_along, aside)
        dist.barrier()
        return aside

    def _write(self) -> None:
        try:
            self._written = {
                name: write_parts(
                    self._aside / name,
                    f"__{dist.get_rank()}_",
                    content.parts,
                    content.common,
                    threads=self._threads,
                )
                for name, content in self._contents.items()
            }
        except Exception as error:  # of a thread, so `publish` raises it, on every rank
            self._written = reason(error)

    def is_written(self) -> bool:
        """Whether every rank has written its part, so that `publish` will not wait."""
        waiting = torch.tensor(int(self._thread.is_alive()), dtype=torch.int32, device=device.device())
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
        return not int(waiting)

    def publish(self) -> None:
        """Wait for every rank's part, then give the checkpoint its name."""
        self._thread.join()
        written = on_first_rank(self._written)
        if why := from_first_rank(self._index, written):
            raise OSError(errno.EIO, f"the checkpoint could not be written: {why}", str(self.final))
        publish.finish(self._aside, self.final, self.manifest, records_of(written))

    def _index(self, written: list[Any]) -> str:
        """Write where everything lies; why that cannot be, empty where it was done."""
        for each in written:
            if isinstance(each, str):
                return each
        try:
            for name in self._contents:
                stored = [entry for each in written for entry in each[name].stored]
                require_whole(stored)
                write_index(self._aside / name, stored)
        except OSError as error:
            return reason(error)
        return ""


def records_of(written: list[Any]) -> dict[str, Any]:
    """Size and SHA-256 of what all ranks have written, by the files' names in the checkpoint."""
    return {
        f"{name}/{file}": record
        for each in written
        for name, part in each.items()
        for file, record in part.records.items()
    }


def verified(checkpoint: Checkpoint, *, weights_alone: bool = False) -> Checkpoint:
    """The checkpoint, whose files are what its manifest says; BadInput naming what is damaged.

    weights_alone: of files that hold the optimizer's state, or averages, nothing is read.
    """
    if damage := publish.damage(checkpoint, but=(OPTIMIZER, EMA) if weights_alone else ()):
        raise BadInput(f"{checkpoint.path} is damaged: {', '.join(damage)}.")
    return checkpoint


def load(
    checkpoint: Path,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    *,
    keep: Callable[[str], bool] | None = None,
    average: WeightAverage | None = None,
) -> None:
    """Load weights, and the optimizer's state where one is given, of a checkpoint that was `verified`.

    Stages may be wrapped for training or bare. A tensor whose name `keep` accepts is not in the checkpoint
    and stays as it is. An average begins with the weights where the checkpoint holds none. Raises BadInput
    naming the checkpoint when it does not fit the model, or holds what could run code; OSError where its
    files cannot be read.
    """
    shards = checkpoint / SHARDS
    if read_json(shards / FORMAT, REMEDY).get("sharded_backend") != "torch_dist":
        raise BadInput(f"{shards / FORMAT} is not of the format torch_dist: {REMEDY}.")
    sharded = sharded_model(model)
    held = list(moments.held_here(sharded, optimizer)) if optimizer is not None else []
    averaged = list(average.held_here(sharded)) if average is not None else []
    kept = [_taken_out(sharded[f"model{index}"], keep) for index in range(len(model))]
    strategy = FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replicas())
    with _as_bad_input(checkpoint), unpickling.read_once(shards):
        loaded = dist_checkpointing.load(sharded, str(shards), strategy)
        for index, chunk in enumerate(model):
            _bare(chunk).load_state_dict(loaded[f"model{index}"] | kept[index])
        if optimizer is not None:
            _load_optimizer(checkpoint, optimizer, held, loaded.get("optimizer"))
        if average is not None:
            average.restart()
            if (checkpoint / EMA).is_dir():
                _load_held(checkpoint, ShardsReader(checkpoint / EMA), averaged)


@contextmanager
def _as_bad_input(checkpoint: Path) -> Iterator[None]:
    """Turn what a reader raises of a checkpoint that does not fit into BadInput that names it."""
    try:
        yield
    except CheckpointException as error:  # torch's word for whatever was raised while it read
        [(inner, _), *_] = error.failures.values()
        if isinstance(inner, OSError | Refusal | MemoryError | torch.OutOfMemoryError):
            raise inner from None
        raise BadInput(f"{checkpoint} cannot be loaded: {unpickling.in_words(inner)}.") from error
    except (CheckpointingException, pickle.UnpicklingError) as error:
        raise BadInput(f"{checkpoint} cannot be loaded: {unpickling.in_words(error)}.") from error


def _taken_out(sharded: dict[str, Any], keep: Callable[[str], bool] | None) -> dict[str, torch.Tensor]:
    """The tensors that stay as they are, by their names in the model; `sharded` loses them."""
    names = [name for name, entry in sharded.items() if keep is not None and keep(entry.key)]
    return {name: sharded.pop(name).data for name in names}


def _load_optimizer(
    checkpoint: Path, optimizer: MegatronOptimizer, held: list[moments.Held], earlier: Any
) -> None:
    """Load masters, moments and Adam's step.

    earlier: what is no tensor in a checkpoint whose optimizer lies among the weights, as they all were once.
    """
    own = checkpoint / OPTIMIZER
    reader = ShardsReader(own if own.is_dir() else checkpoint / SHARDS, training_state=True)
    try:
        step = int(reader.common()[STEP]) if own.is_dir() else _earlier_step(earlier)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{checkpoint} holds no step of Adam to go on from: {REMEDY}.") from None
    _load_held(checkpoint, reader, held)
    for part in moments.parts_of(optimizer):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = step
        part.load_state_dict(state)


def _load_held(checkpoint: Path, reader: ShardsReader, held: list[moments.Held]) -> None:
    try:
        moments.load(reader, held)
    except moments.Misfit as misfit:
        raise BadInput(f"{checkpoint} cannot be loaded: {misfit}.") from None


def _adam_step_of(optimizer: MegatronOptimizer) -> int:
    states = [part.state_dict()["optimizer"] for part in moments.parts_of(optimizer)]  # wherever it keeps it
    groups = [group for state in states for group in state["param_groups"]]
    return max((int(group.get("step") or 0) for group in groups), default=0)


def _earlier_step(saved: dict[Any, Any]) -> int:
    """megatron-core chained one optimizer per kind of process group; the layout decided how many."""
    states = [saved, *(state for index, state in saved.items() if isinstance(index, int))]
    return max(
        int(group.get("step", 0))
        for state in states
        if "optimizer" in state
        for group in state["optimizer"]["param_groups"]
    )


def _bare(stage: torch.nn.Module) -> torch.nn.Module:
    """The stage inside the wrapper that training puts around it."""
    return stage.module if isinstance(stage, DistributedDataParallel) else stage


def _replicas() -> dist.ProcessGroup:
    """The ranks among which the same weights are dealt out."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def sharded_model(model: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """megatron-core's description of every stage's weights and their place in the whole model."""
    metadata = {**SHARDING_METADATA, "dp_cp_group": _replicas()}
    return {
        f"model{index}": _bare(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model)
    }


def _part_of(shard: ShardedTensor) -> tuple[Part, torch.Tensor]:
    size = (*(1 for _ in range(shard.prepend_axis_num)), *shard.local_shape)
    part = Part(shard.key, tuple(shard.global_shape), tuple(shard.global_offset), size)
    return part, shard.data.detach().view(size)


def _require_space(checkpoints: Path, contents: dict[str, _Content]) -> None:
    """Raise OSError before anything is written where the disk has no room for the parts of all ranks."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    own = sum(values.nbytes for content in contents.values() for _, values in content.parts)
    needed = torch.tensor(own, dtype=torch.int64, device=device.device())
    dist.all_reduce(needed)
    free = torch.tensor(shutil.disk_usage(checkpoints).free, dtype=torch.int64, device=device.device())
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {int(needed):,} bytes, {int(free):,} are free: make room or change run.dir",
            str(checkpoints),
        )


def reason(error: BaseException) -> str:
    """The last line of an error: torch's checkpoint errors put the ranks' tracebacks before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
