"""A start's way from copies in memory (memory.py) back to a checkpoint of the run."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.checkpoint import publish
from llada_megatron.checkpoint.memory import place_of, ranks_by_node, run_id
from llada_megatron.checkpoint.shards import HashedFile
from llada_megatron.config.errors import BadInput
from llada_megatron.parallel.ranks import barrier, from_first_rank, gathered, rank, warn
from llada_megatron.record import events
from llada_megatron.record.manifest import CHUNK_BYTES, Checkpoint
from llada_megatron.record.run_dir import MANIFEST, RunDir, step_of


@dataclass(frozen=True, order=True)
class Copy:
    """A copy by its step and its manifest's digest: two attempts of a run may have made one of a step."""

    step: int
    sha256: str


def recall(run_dir: Path, memory_dir: str) -> None:
    """Write the newest whole copy in memory into run_dir, where it is newer than each checkpoint there.

    Every rank calls it and writes a part. A file that is damaged on one node is taken from the other that
    has it; a copy that lacks one is passed over, with a warning. Raises OSError, on every rank alike, where
    run_dir cannot be written to.
    """
    identity = from_first_rank(run_id, run_dir)
    if not identity:
        return
    on_disk = from_first_rank(RunDir(run_dir).newest_step)
    place, nodes = place_of(memory_dir, identity), ranks_by_node()
    offered = gathered(_offered(place, on_disk) if _leads(nodes) else [])
    for copy in sorted({each for part in offered for each in part}, reverse=True):
        source = next(index for index, part in enumerate(offered) if copy in part)
        final = RunDir(run_dir).checkpoint(copy.step)
        content = gathered(_manifest(place, copy) if rank() == source else b"")[source]
        checkpoint = Checkpoint.of(final, content)
        if lost := _write_out(place / final.name, checkpoint, nodes):
            warn(
                f"the copy in memory of step {copy.step} is passed over: no node has {lost[0]} as it was"
                f" written{f', and {len(lost) - 1} more files' if lost[1:] else ''}."
            )
            continue
        if rank() == 0:
            (_aside(final) / MANIFEST).write_bytes(content)
            publish.give_name(_aside(final), final, synced=checkpoint.manifest.files)
            events.append(run_dir, "recalled", step=copy.step)
            print(f"{final.name} comes from the memory of the nodes", flush=True)
        barrier()
        return
    last = from_first_rank(_last_remembered, run_dir)
    if last > on_disk:
        warn(f"no copy in memory of step {last} is left: the run goes on from step {on_disk}, on the disk.")


def _leads(nodes: list[list[int]]) -> bool:
    return any(ranks[0] == rank() for ranks in nodes)


def _last_remembered(run_dir: Path) -> int:
    event = events.last(events.read(run_dir), "remembered")
    return event["step"] if event and isinstance(event.get("step"), int) else 0


def _offered(place: Path, after: int) -> list[Copy]:
    """Copies of this node past a step, in a folder that is this user's."""
    found: list[Copy] = []
    with suppress(OSError):
        if place.is_symlink() or place.stat().st_uid != os.geteuid():
            return found
        for folder in place.glob("step_*"):
            with suppress(OSError, BadInput):  # one that is being made, or deleted, has no whole manifest
                content = (folder / MANIFEST).read_bytes()
                step = Checkpoint.of(folder, content).manifest.step
                if step == step_of(folder) and step > after:
                    found.append(Copy(step, hashlib.sha256(content).hexdigest()))
    return found


def _manifest(place: Path, copy: Copy) -> bytes:
    return (place / RunDir("").checkpoint(copy.step).name / MANIFEST).read_bytes()


def _aside(final: Path) -> Path:
    return publish.partial(final)


def _write_out(here: Path, checkpoint: Checkpoint, nodes: list[list[int]]) -> list[str]:
    """Write the files of a copy beside its name in the run, hashed; those that no node has as they were.

    here: this node's folder of the copy.
    """
    files = checkpoint.manifest.files
    found = {name for name, record in files.items() if _size(here / name) == record["bytes"]}
    held = gathered(found if _leads(nodes) else set())
    holders = {name: [ranks for ranks in nodes if name in held[ranks[0]]] for name in files}
    aside = publish.begin(checkpoint.path)
    if rank() == 0:
        for folder in {(aside / name).parent for name in files}:
            folder.mkdir(parents=True, exist_ok=True)
    barrier()
    missing = sorted(files)
    for turn in range(max(map(len, holders.values()), default=0)):
        mine = []
        for index, name in enumerate(sorted(files)):
            if name in missing and turn < len(holders[name]):
                ranks = holders[name][(index + turn) % len(holders[name])]
                if ranks[index % len(ranks)] == rank():
                    mine.append(name)
        whole, why = _taken(here, aside, mine, checkpoint)
        told = gathered((whole, why))
        if failures := [failure for _, failure in told if failure]:
            raise OSError(f"{checkpoint.path} cannot be written: {failures[0]}")
        there = {name for names, _ in told for name in names}
        missing = [name for name in missing if name not in there]
    if missing and rank() == 0:
        shutil.rmtree(aside)
    barrier()
    return missing


def _taken(here: Path, aside: Path, names: list[str], checkpoint: Checkpoint) -> tuple[list[str], str]:
    """Which of the named files were written as the manifest says, and why the disk took no more of them."""
    whole = []
    for name in names:
        try:
            file = HashedFile(aside / name)
            for chunk in _chunks(here / name):
                file.write(chunk)
            if file.close() == checkpoint.manifest.files[name]:
                whole.append(name)
        except OSError as error:
            return whole, str(error)
    return whole, ""


def _chunks(path: Path) -> Iterator[bytes]:
    """The content of a file, up to where it cannot be read: its digest tells."""
    try:
        with open(path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError:
        return


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
