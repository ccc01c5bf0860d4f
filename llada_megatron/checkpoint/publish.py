"""A checkpoint gets its name when it is whole: written aside, hashed, synced, renamed.

The directory `.step_00000012.partial` is never looked for, so whatever happens to a writer, nothing
half-written is ever loaded. Every function is collective where there is a process group, and needs none.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.parallel.ranks import barrier, from_first_rank, gathered, rank, ranks
from llada_megatron.record.manifest import (
    Checkpoint,
    Manifest,
    file_damage,
    file_record,
    git_commit,
    versions,
)
from llada_megatron.record.run_dir import MANIFEST, damaged, partial


def begin(final: Path) -> Path:
    """Make the directory to write into; BadInput when `final` is there already."""
    aside = partial(final)
    if from_first_rank(final.exists):
        raise BadInput(f"{final} exists already: remove it, or choose another place.")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    return aside


def finish(aside: Path, final: Path, manifest: Manifest, hashed: dict[str, Any] | None = None) -> None:
    """Hash every file into the manifest, and give the directory its name.

    `hashed` holds the records of files that this rank has hashed already, by path in the checkpoint; the
    others are dealt out over the ranks.
    """
    names = from_first_rank(_files, aside)
    known = _merge(hashed or {})
    left = [name for name in names if name not in known]
    manifest.files = known | _merge({name: file_record(aside / name) for name in _share(left)})
    manifest.versions = versions()
    if rank() == 0:
        manifest.git_commit = git_commit()
        manifest.write(aside)
        give_name(aside, final)
    barrier()


def give_name(aside: Path, final: Path) -> None:
    """Sync a directory that is whole and rename it; one rank calls it."""
    _sync(aside)
    os.replace(aside, final)
    _sync_directory(final.parent)


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def damage(checkpoint: Checkpoint) -> list[str]:
    """What is wrong with the files of a checkpoint, one phrase each; every rank hashes a share of them."""
    found = gathered(file_damage(checkpoint, _share(sorted(checkpoint.manifest.files))))
    return [phrase for part in found for phrase in part]


def set_aside_damaged(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that it is kept and never looked for; returns the new path."""

    def rename() -> Path:
        target = damaged(checkpoint)
        while target.exists():
            target = target.with_name(f"{target.name}_again")
        os.replace(checkpoint, target)
        return target

    return from_first_rank(rename)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint; interrupted, it leaves nothing with a manifest. One rank calls it."""
    (checkpoint / MANIFEST).unlink()
    shutil.rmtree(checkpoint)


def _share(names: list[str]) -> list[str]:
    return names[rank() :: ranks()]


def _merge(mine: dict[str, Any]) -> dict[str, Any]:
    return {name: record for part in gathered(mine) for name, record in part.items()}


def _sync(directory: Path) -> None:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            _sync_directory(path)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
