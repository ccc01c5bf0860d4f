"""A checkpoint gets its name when it is whole: written aside, hashed, synced, renamed.

The directory `.step_00000012.partial` is never looked for, so whatever happens to a writer, nothing
half-written is ever loaded. Every function is collective where there is a process group, and needs none.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
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

THREADS = 4
"""That hash files, per rank."""


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
    """Record every file in the manifest, and give the directory its name; rank 0 does it.

    `hashed` holds the records of files that were hashed and synced as they were written, by their paths in
    the checkpoint; the others are read.
    """
    if rank() == 0:
        known = hashed or {}
        completed(aside, manifest, known).write(aside)
        give_name(aside, final, synced=known)
    barrier()


def completed(aside: Path, manifest: Manifest, hashed: dict[str, Any]) -> Manifest:
    """The manifest with a record of every file of a directory, and what wrote them; one rank calls it."""
    left = [name for name in _files(aside) if name not in hashed]
    records = _in_threads(lambda name: file_record(aside / name), left)
    manifest.files = hashed | dict(zip(left, records, strict=True))
    manifest.versions = versions()
    manifest.git_commit = git_commit()
    return manifest


def give_name(aside: Path, final: Path, synced: Collection[str] = ()) -> None:
    """Sync a directory that is whole, but for the files that were, and rename it; one rank calls it."""
    _sync(aside, synced)
    os.replace(aside, final)
    _sync_directory(final.parent)


def _files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def damage(checkpoint: Checkpoint, *, but: Collection[str] = ()) -> list[str]:
    """What is wrong with the files of a checkpoint, one phrase each; every rank hashes a share of them.

    `but` names folders that are left out. A rank takes the files that the rank of its number wrote, so in the
    layout that saved a load finds them in its node's memory.
    """
    names = [name for name in sorted(checkpoint.manifest.files) if name.partition("/")[0] not in but]
    share = written_here(names)
    found = gathered(_in_threads(lambda name: file_damage(checkpoint, [name]), share))
    return [phrase for part in found for of_file in part for phrase in of_file]


def written_here(names: Sequence[str]) -> list[str]:
    """This rank's share of a checkpoint's files: those that it has written, in the layout that saved it."""
    return [name for index, name in enumerate(sorted(names)) if _writer(name, index) % ranks() == rank()]


def _writer(name: str, index: int) -> int:
    """The rank that wrote a file; of one that does not say so, its place in the list."""
    named = re.search(r"/__(\d+)_\d+\.distcp$", name)
    return int(named[1]) if named else index


def _in_threads[T](function: Callable[[str], T], names: list[str]) -> list[T]:
    """Hashing lets other threads run."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, names))


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


def _sync(directory: Path, synced: Collection[str]) -> None:
    for path in sorted(directory.rglob("*")):
        if str(path.relative_to(directory)) in synced:
            continue
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
