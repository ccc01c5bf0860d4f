"""Save and load a run's weights and optimizer over megatron-core's dist_checkpointing."""

from __future__ import annotations

import errno
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CONFIG_FNAME as FORMAT
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from llada_megatron.checkpoint import publish
from llada_megatron.config.errors import BadInput, Refusal
from llada_megatron.model.initialize import SHARDING_METADATA
from llada_megatron.record import carried
from llada_megatron.record.json_files import read_json
from llada_megatron.record.manifest import Checkpoint, Manifest, file_record
from llada_megatron.record.run_dir import SHARDS
from llada_megatron.runtime import device, unpickling, writer_queue

OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


class Save:
    """One checkpoint on its way: captured when made, written by a thread, published by `publish`.

    In the background every tensor is copied to host memory first, so training may go on at once. Every rank
    makes it and calls each method. Raises OSError naming the path when it cannot be written; what was
    published before stays whole.
    """

    def __init__(
        self,
        final: Path,
        manifest: Manifest,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer | None,
        *,
        carried_along: Mapping[str, bytes],
        in_background: bool,
    ) -> None:
        """carried_along: files of the checkpoint's `hf/` by name; the first rank's are written."""
        self.final, self.manifest = final, manifest
        for chunk in model:
            if chunk.ddp_config.overlap_param_gather:  # the next forward would gather what the optimizer left
                chunk.start_param_sync(force_sync=True)
        sharded = _sharded(model, optimizer)
        _require_space(final.parent, sharded)
        self._aside = publish.begin(final)
        shards = self._aside / SHARDS
        if dist.get_rank() == 0:
            shards.mkdir()
            carried.write(carried_along, self._aside)
        dist.barrier()
        self._hashed: dict[str, Any] = {}
        writer_queue.use_plain_queue()
        with _as_os_error(final):
            self._request = dist_checkpointing.save(
                sharded, str(shards), async_sharded_save=True, async_strategy="mcore"
            )
        rank, buckets, results = self._request.async_fn_args or (dist.get_rank(), [], None)
        captured = [
            (file, key, (objects, [(item, tensor.to("cpu", copy=in_background)) for item, tensor in tensors]))
            for file, key, (objects, tensors) in buckets
        ]
        self._thread = threading.Thread(target=self._write, args=(rank, captured, results), daemon=True)
        self._thread.start()

    def _write(self, rank: int, buckets: list[Any], results: Any) -> None:
        if not buckets:
            return
        self._request.async_fn(rank, buckets, results)  # puts an error into `results`, for the finalization
        for path in sorted((self._aside / SHARDS).glob(f"__{rank}_*")):
            self._hashed[f"{SHARDS}/{path.name}"] = file_record(path)

    def is_written(self) -> bool:
        """Whether every rank has written its part, so that `publish` will not wait."""
        waiting = torch.tensor(int(self._thread.is_alive()), dtype=torch.int32, device=device.device())
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
        return not int(waiting)

    def publish(self) -> None:
        """Wait for every rank's part, then give the checkpoint its name."""
        self._thread.join()
        with _as_os_error(self.final):
            for finalize in self._request.finalize_fns:
                finalize()
        publish.finish(self._aside, self.final, self.manifest, self._hashed)


@contextmanager
def _as_os_error(final: Path) -> Iterator[None]:
    """Turn what a failed write raises, which differs by place, into an OSError that names the checkpoint."""
    try:
        yield
    except (OSError, CheckpointException) as error:  # a RuntimeError is a collective whose peer is gone
        reason = f"the checkpoint could not be written: {_reason(error)}"
        raise OSError(errno.EIO, reason, str(final)) from error


def verified(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, whose files are what its manifest says; BadInput naming what is damaged."""
    if damage := publish.damage(checkpoint):
        raise BadInput(f"{checkpoint.path} is damaged: {', '.join(damage)}.")
    return checkpoint


def load(
    checkpoint: Path,
    model: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
    *,
    keep: Callable[[str], bool] | None = None,
) -> None:
    """Load weights, and the optimizer's state where one is given, of a checkpoint that was `verified`.

    Stages may be wrapped for training or bare. A tensor whose name `keep` accepts is not in the checkpoint
    and stays as it is. Raises BadInput naming the checkpoint when it does not fit
    the model, or holds what could run code; OSError where its files cannot be read.
    """
    shards = checkpoint / SHARDS
    remedy = "take another checkpoint"
    if read_json(shards / FORMAT, remedy).get("sharded_backend") != "torch_dist":
        raise BadInput(f"{shards / FORMAT} is not of the format torch_dist: {remedy}.")
    sharded = _sharded(model, optimizer, is_loading=True)
    kept = [_taken_out(sharded[f"model{index}"], keep) for index in range(len(model))]
    try:
        with unpickling.read_once(shards):
            loaded = dist_checkpointing.load(sharded, str(shards))
    except CheckpointException as error:  # torch's word for whatever was raised while it read
        [(inner, _), *_] = error.failures.values()
        if isinstance(inner, OSError | Refusal | MemoryError | torch.OutOfMemoryError):
            raise inner from None
        raise BadInput(f"{checkpoint} cannot be loaded: {unpickling.in_words(inner)}.") from error
    except (CheckpointingException, pickle.UnpicklingError) as error:
        raise BadInput(f"{checkpoint} cannot be loaded: {unpickling.in_words(error)}.") from error
    for index, chunk in enumerate(model):
        _bare(chunk).load_state_dict(loaded[f"model{index}"] | kept[index])
    if optimizer is not None:
        try:
            step = _adam_step(loaded["optimizer"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise BadInput(f"{checkpoint} holds no step of Adam to go on from: {remedy}.") from None
        _load_optimizer(optimizer, loaded["optimizer"], step)


def _taken_out(sharded: dict[str, Any], keep: Callable[[str], bool] | None) -> dict[str, torch.Tensor]:
    """The tensors that stay as they are, by their names in the model; `sharded` loses them."""
    names = [name for name, entry in sharded.items() if keep is not None and keep(entry.key)]
    return {name: sharded.pop(name).data for name in names}


def _adam_step(loaded: dict[Any, Any]) -> int:
    saved = [loaded, *(state for index, state in loaded.items() if isinstance(index, int))]
    return max(
        int(group.get("step", 0))
        for state in saved
        if "optimizer" in state
        for group in state["optimizer"]["param_groups"]
    )


def _load_optimizer(optimizer: MegatronOptimizer, loaded: dict[Any, Any], step: int) -> None:
    """Load moments and masters, and Adam's step.

    megatron-core chains one optimizer per kind of process group, so the layout decides how many there are,
    and the saved non-tensor part may be of another number. All it holds but the step is configuration.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    for index, part in enumerate(parts):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = step
        state["param_state"] = (loaded if len(parts) == 1 else loaded[index])["param_state"]
        state["param_state_sharding_type"] = OPTIMIZER_METADATA["distrib_optim_sharding_type"]
        part.load_state_dict(state)


def _bare(stage: torch.nn.Module) -> torch.nn.Module:
    """The stage inside the wrapper that training puts around it."""
    return stage.module if isinstance(stage, DistributedDataParallel) else stage


def _sharded(
    model: Sequence[torch.nn.Module], optimizer: MegatronOptimizer | None, *, is_loading: bool = False
) -> dict[str, Any]:
    metadata = {
        **SHARDING_METADATA,
        **OPTIMIZER_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        f"model{index}": _bare(chunk).sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
    return state


def _require_space(checkpoints: Path, sharded: dict[str, Any]) -> None:
    """Raise OSError before anything is written where the disk has no room for the shards of all ranks."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    shards = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    written = [shard for shard in shards if shard.data is not None and is_main_replica(shard.replica_id)]
    own = sum(shard.data.nbytes for shard in written)
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


def _reason(error: BaseException) -> str:
    """The last line of an error: torch's checkpoint errors put the ranks' tracebacks before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
