"""What a checkpoint is: its manifest, readable without torch and without loading a tensor.

runs/NAME/checkpoints/step_00000012/
    shards/         megatron-core's torch_dist format: weights
    optimizer/      the same format: masters and moments, for a resume in any layout
    hf/             configurations and tokenizer that came with the weights (carried.py)
    manifest.json   position, configuration, origin, SHA-256 of every file; its presence means "whole"
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json, read_bytes
from llada_megatron.record.run_dir import MANIFEST, RunDir

PACKAGES = ("torch", "megatron-core", "numpy", "llada-megatron")
CHUNK_BYTES = 1 << 22
OF_A_STAGE = {"model": ("rotary_base", "rotary_scaling"), "data": ("sequence_length", "path", "weights")}
"""What a stage of the schedule may say for itself of how its weights are used, by groups."""


@dataclass
class Manifest:
    """The record of one checkpoint; training fields stay at their defaults where nothing was trained."""

    config: dict[str, Any]
    """The run's configuration; of a checkpoint that no run wrote, its `model` alone."""
    step: int = 0
    """Steps done: training goes on with this one."""
    consumed_samples: int = 0
    consumed_tokens: int = 0
    global_batches: list[list[int]] = field(default_factory=list)
    """`[first step, samples of each step from there on]`, as often as it changed; empty: it never did."""
    stage: str = ""
    block_size: int = 0
    stage_ended: bool = False
    skipped_steps: int = 0
    skipped_lately: list[int] = field(default_factory=list)
    """Which steps were skipped, and below the step of each sample that was left out, of the latest window."""
    left_out_lately: list[int] = field(default_factory=list)
    losses_lately: list[float] = field(default_factory=list)
    """Of the stage's last steps that were learnt from, and their gradient norms: what spikes are told by."""
    grad_norms_lately: list[float] = field(default_factory=list)
    rollbacks: list[list[int]] = field(default_factory=list)
    """`[step of the checkpoint, step]` for each time that the run had done `step` steps and took the weights
    of that checkpoint: what it had learnt from the samples between them was given up."""
    wall_sec: float = 0.0
    """Seconds of training so far, over all restarts."""
    autoregressive_tokens: int = 0
    """Data tokens of the run whose weights this one started from (checkpoint.init_from)."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Evaluation of these weights, in nats per token: `nll_ar`, `nll_block4`, ..."""
    data_fingerprint: dict[str, Any] = field(default_factory=dict)
    data_read: list[dict[str, Any]] = field(default_factory=list)
    """Of each corpus its `sequences`, `[L, how many of L tokens]` in the order in which they were read."""
    versions: dict[str, str] = field(default_factory=dict)
    git_commit: str = ""
    lineage: dict[str, Any] = field(default_factory=dict)
    """`kind` (hf-to-mcore, merge, upcycle) and its sources, for a checkpoint made from others."""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`bytes` and `sha256` of every file beside this one, by its path in the checkpoint."""

    @property
    def config_of_weights(self) -> dict[str, Any]:
        """The configuration that the weights are used with: as the stage has it that trained them last.

        What it says for itself of the model and its data takes the place of what the run says
        (config/stage_settings.py).
        """
        stages = self.config.get("schedule", {}).get("stages", [])
        own: dict[str, Any] = next((stage for stage in stages if stage.get("name") == self.stage), {})
        found = dict(self.config)
        for group, names in OF_A_STAGE.items():
            if said := {name: own[name] for name in names if own.get(name)}:
                if "path" in said:  # whose weights are not those of the run's
                    said.setdefault("weights", [])
                found[group] = {**found.get(group, {}), **said}
        return found

    def batches(self, global_batch: int) -> list[tuple[int, int]]:
        """(first step, samples of each step from there on), the last one for a run that goes on from here."""
        known = self.global_batches or [[0, self.config.get("layout", {}).get("global_batch", global_batch)]]
        parts = [(first, batch) for first, batch in known if first < self.step]
        if not parts or parts[-1][1] != global_batch:
            parts.append((self.step, global_batch))
        return parts

    def content(self) -> bytes:
        """Of manifest.json, with a digest of itself."""
        content = asdict(self)
        return json.dumps({"sha256": _digest(content), **content}, indent=1).encode()

    def write(self, checkpoint: Path) -> None:
        """Write manifest.json."""
        (checkpoint / MANIFEST).write_bytes(self.content())


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint and what its manifest says: read once, and passed on."""

    path: Path
    manifest: Manifest

    @staticmethod
    def read(path: Path) -> Checkpoint:
        """Raises BadInput for a directory that is no whole checkpoint, or whose manifest is damaged.

        OSError where the disk does not answer: that says nothing about the checkpoint.
        """
        try:
            content = read_bytes(path / MANIFEST, "give the directory of a checkpoint")
        except BadInput as error:
            raise _not_whole(path, str(error)) from None
        return Checkpoint.of(path, content)

    @staticmethod
    def of(path: Path, content: bytes) -> Checkpoint:
        """The checkpoint at a path whose manifest this is; BadInput where it is damaged."""
        try:
            said = parse_json(content)
            if not isinstance(said, dict) or said.pop("sha256", None) != _digest(said):
                raise BadInput("it was changed after it was written")
            manifest = Manifest(**said)
        except (TypeError, ValueError) as error:
            raise _not_whole(path, str(error)) from None
        if fault := _fault(manifest):
            raise _not_whole(path, fault)
        return Checkpoint(path, manifest)


def _not_whole(path: Path, why: str) -> BadInput:
    return BadInput(f"{path} is not a whole checkpoint ({MANIFEST}: {why}).")


def _fault(manifest: Manifest) -> str | None:
    """What in a manifest is of another kind than the fields of Manifest."""
    for entry in fields(manifest):
        value, plain = getattr(manifest, entry.name), getattr(Manifest(config={}), entry.name)
        kinds = (int, float) if isinstance(plain, float) else type(plain)
        if plain is not None and not isinstance(value, kinds):
            return f"{entry.name} is {type(value).__name__}"
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            return f"{entry.name} is {value}"
    for name, figure in manifest.metrics.items():
        if not isinstance(figure, int | float):
            return f"metrics.{name} is {type(figure).__name__}"
    for name, record in manifest.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{name} lies outside the checkpoint"
        held = {key: type(value) for key, value in record.items()} if isinstance(record, dict) else {}
        if held != {"bytes": int, "sha256": str}:
            return f"{name} has no size and SHA-256"
    return None


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def file_damage(checkpoint: Checkpoint, names: list[str]) -> list[str]:
    """What is wrong with the named files of a checkpoint, one phrase each, by its manifest."""
    found = []
    for name in names:
        path, expected = checkpoint.path / name, checkpoint.manifest.files[name]
        if not path.is_file():
            found.append(f"{name} is missing")
        elif (size := path.stat().st_size) != expected["bytes"]:
            found.append(f"{name} has {size:,} bytes of {expected['bytes']:,}")
        elif file_record(path) != expected:
            found.append(f"{name} has another SHA-256")
    return found


def readable(run_dir: Path) -> list[Checkpoint]:
    """Checkpoints of a run, oldest first, without those whose manifest is damaged."""
    found = []
    for path in RunDir(run_dir).whole_checkpoints():
        with suppress(BadInput):
            found.append(Checkpoint.read(path))
    return found


def find(where: str) -> Checkpoint:
    """The checkpoint at a path, or the newest of the run at that path; BadInput if none, or a damaged one."""
    path = Path(where)
    if (path / MANIFEST).is_file():
        return Checkpoint.read(path)
    checkpoints = RunDir(path).whole_checkpoints()
    if not checkpoints:
        raise BadInput(f"{where} is neither a checkpoint nor a run with one.")
    return Checkpoint.read(checkpoints[-1])


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint means."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


@cache
def git_commit() -> str:
    """The commit of this source as first found, with `-dirty` when files differ; empty outside a clone."""
    return _of_our_clone("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").strip()


def git_diff() -> str:
    """How this source differs from its commit, as a patch; empty outside a clone."""
    return _of_our_clone("diff", "HEAD", "--", ":/")


def _of_our_clone(*arguments: str) -> str:
    """What git says of the clone that this source belongs to; empty where it belongs to none.

    A package that is installed inside another project's clone lies there without being part of it.
    """
    here = Path(__file__)
    is_ours = _git("ls-files", "--error-unmatch", here.name, cwd=here.parent) is not None
    return (_git(*arguments, cwd=here.parent) or "") if is_ours else ""


def _git(*arguments: str, cwd: Path) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
