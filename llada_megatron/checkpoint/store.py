"""Save, publish, find, load and retire checkpoints of a run.

runs/NAME/checkpoints/step_00000012/
    shards/         megatron-core's torch_dist format: weights, fully reshardable optimizer state, SHA-256s
    manifest.json   position, configuration, data fingerprint, versions; its presence means "whole"

A checkpoint is written as `.step_00000012.partial` and renamed when every rank is done, so a half-written
one never has a name that is looked for.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from llada_megatron.model.initialize import SHARDING_METADATA
from llada_megatron.runtime import device

PACKAGES = ("torch", "megatron-core", "numpy", "llada-megatron")
OPTIMIZER_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "chained_optim_avoid_prefix": True,
}


@dataclass
class Manifest:
    """What a checkpoint is, readable without loading it."""

    step: int
    """Steps done: training goes on with this one."""
    consumed_samples: int
    consumed_tokens: int
    stage: str
    block_size: int
    stage_ended: bool
    skipped_steps: int
    config: dict[str, Any]
    data_fingerprint: dict[str, Any]
    versions: dict[str, str]
    wall_sec: float = 0.0
    """Seconds of training so far, over all restarts."""
    autoregressive_tokens: int = 0
    """Data tokens of the run whose weights this one started from (checkpoint.init_from)."""

    @staticmethod
    def read(checkpoint: Path) -> Manifest:
        """Raises ValueError for a directory that is not a whole checkpoint."""
        path = checkpoint / "manifest.json"
        try:
            return Manifest(**json.loads(path.read_text()))
        except (OSError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{checkpoint} is not a whole checkpoint ({path.name}: {error}).") from None


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint means."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints of a run that were published, oldest first."""
    found = sorted((run_dir / "checkpoints").glob("step_*"))
    return [path for path in found if (path / "manifest.json").is_file()]


def find(where: str) -> Path:
    """The checkpoint at a path, or the newest of the run at that path; ValueError if there is none."""
    path = Path(where)
    if (path / "manifest.json").is_file():
        return path
    checkpoints = whole_checkpoints(path)
    if not checkpoints:
        raise ValueError(f"{where} is neither a checkpoint nor a run with one.")
    return checkpoints[-1]


def save(
    run_dir: Path,
    manifest: Manifest,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    *,
    keep_last: int,
) -> Path:
    """Write and publish a checkpoint, then retire old ones; every rank calls it.

    Raises OSError naming the path when it cannot be written; what was published before stays whole.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:  # the next forward would gather what the optimizer left
            chunk.start_param_sync(force_sync=True)
    final = run_dir / "checkpoints" / f"step_{manifest.step:08d}"
    aside = final.with_name(f".{final.name}.partial")
    sharded = _sharded(model, optimizer)
    _require_space(run_dir, sharded)
    if dist.get_rank() == 0:
        for left_behind in final.parent.glob(".step_*.partial"):
            shutil.rmtree(left_behind)
        (aside / "shards").mkdir(parents=True)
    dist.barrier()
    try:
        dist_checkpointing.save(sharded, str(aside / "shards"), verify_integrity=True)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        raise OSError(
            errno.EIO, f"the checkpoint could not be written: {_reason(error)}", str(final)
        ) from error
    if dist.get_rank() == 0:
        (aside / "manifest.json").write_text(json.dumps(asdict(manifest), indent=1))
        _sync(aside)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        _sync_directory(final.parent)
        _retire(run_dir, keep_last)
    dist.barrier()
    return final


def load(checkpoint: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer | None) -> None:
    """Load weights, and the optimizer's state where one is given, after checking the files' hashes.

    Raises ValueError naming the checkpoint when a file is damaged or does not fit the model.
    """
    sharded = _sharded(model, optimizer, is_loading=True)
    try:
        loaded = dist_checkpointing.load(sharded, str(checkpoint / "shards"), verify_integrity=True)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{checkpoint} cannot be loaded: {_reason(error)}") from error
    for index, chunk in enumerate(model):
        chunk.module.load_state_dict(loaded[f"model{index}"])
    if optimizer is not None:
        _load_optimizer(optimizer, loaded["optimizer"])


def _load_optimizer(optimizer: MegatronOptimizer, loaded: dict[Any, Any]) -> None:
    """Load moments and masters, and Adam's step.

    megatron-core chains one optimizer per kind of process group, so the layout decides how many there are,
    and the saved non-tensor part may be of another number. All it holds but the step is configuration.
    """
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    saved = [loaded, *(state for index, state in loaded.items() if isinstance(index, int))]
    groups = [
        group for state in saved if "optimizer" in state for group in state["optimizer"]["param_groups"]
    ]
    adam_step = max(group.get("step", 0) for group in groups)
    for index, part in enumerate(parts):
        state = part.state_dict()
        for group in state["optimizer"]["param_groups"]:
            group["step"] = adam_step
        state["param_state"] = (loaded if len(parts) == 1 else loaded[index])["param_state"]
        state["param_state_sharding_type"] = OPTIMIZER_METADATA["distrib_optim_sharding_type"]
        part.load_state_dict(state)


def _sharded(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer | None, *, is_loading: bool = False
) -> dict[str, Any]:
    metadata = {
        **SHARDING_METADATA,
        **OPTIMIZER_METADATA,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    state: dict[str, Any] = {
        f"model{index}": chunk.module.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(model)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(state), is_loading=is_loading, metadata=metadata
        )
    return state


def _require_space(run_dir: Path, sharded: dict[str, Any]) -> None:
    """Raise OSError before anything is written where the disk has no room for the shards of all ranks."""
    shards = [value for value in nested_values(sharded) if isinstance(value, ShardedTensor)]
    written = [shard for shard in shards if shard.data is not None and is_main_replica(shard.replica_id)]
    own = sum(shard.data.nbytes for shard in written)
    needed = torch.tensor(own, dtype=torch.int64, device=device.device())
    dist.all_reduce(needed)
    free = torch.tensor(shutil.disk_usage(run_dir).free, dtype=torch.int64, device=device.device())
    dist.all_reduce(free, op=dist.ReduceOp.MIN)
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"a checkpoint takes {int(needed):,} bytes, {int(free):,} are free: make room or change run.dir",
            str(run_dir),
        )


def _retire(run_dir: Path, keep_last: int) -> None:
    """Delete all but the newest `keep_last` checkpoints; those at the end of a stage stay."""
    for checkpoint in whole_checkpoints(run_dir)[: -max(keep_last, 1)]:
        if not Manifest.read(checkpoint).stage_ended:
            (checkpoint / "manifest.json").unlink()  # first, or a crash here leaves half of it with a name
            shutil.rmtree(checkpoint)


def _sync(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The last line of an error: torch's checkpoint errors put the ranks' tracebacks before it."""
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
