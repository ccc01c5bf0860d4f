"""Copies of a run in its nodes' memory between two saves to the disk: each node keeps its own and a peer's.

    MEMORY_DIR/NODE/RUN_ID/step_00000012/   files of a checkpoint: those that this node's ranks have written,
                                            and those of the node before it, in a ring of all nodes
        manifest.json                       of the whole checkpoint, on every node; written last, it commits

Names and bytes are those of a checkpoint in RUN/checkpoints, so that two neighbours have to be lost before a
file is. `recall.py` reads them.
"""

from __future__ import annotations

import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llada_megatron.checkpoint import publish
from llada_megatron.checkpoint.store import Save, reason, records_of
from llada_megatron.parallel.ranks import barrier, from_first_rank, gathered, on_first_rank, rank
from llada_megatron.record import carried
from llada_megatron.record.manifest import Checkpoint
from llada_megatron.record.run_dir import MANIFEST, RunDir
from llada_megatron.runtime import device
from llada_megatron.runtime.launch import node

CHUNK_BYTES = 1 << 26
"""Of a message between peers."""


def run_id(run_dir: Path) -> str:
    """What no other run has, not even a later one in the same directory; empty where nothing made it."""
    path = RunDir(run_dir).identity
    said = path.read_text(errors="replace").strip() if path.is_file() else ""
    return said if re.fullmatch(r"[0-9a-f]{32}", said) else ""


def place_of(memory_dir: str, identity: str) -> Path:
    """Where this node keeps copies of a run."""
    return Path(memory_dir) / node() / identity


def ranks_by_node() -> list[list[int]]:
    """The ranks of each node; every rank calls it."""
    found: dict[str, list[int]] = {}
    for each, name in enumerate(gathered(node())):
        found.setdefault(name, []).append(each)
    return list(found.values())


class Memory:
    """The copies of a run; every rank makes it and calls each method alike."""

    def __init__(self, run_dir: Path, memory_dir: str) -> None:
        self.place = place_of(memory_dir, from_first_rank(_made_run_id, run_dir))
        nodes = ranks_by_node()
        at = next(index for index, ranks in enumerate(nodes) if rank() in ranks)
        local = nodes[at].index(rank())
        self.leads = local == 0
        """Whether this rank acts for its node."""
        self.peer: int | None = None
        """The rank that keeps this one's files too: of the same number on the next node."""
        self.before: int | None = None
        """The rank whose files this one keeps."""
        if len(nodes) > 1 and len({len(ranks) for ranks in nodes}) == 1:
            self.peer = nodes[(at + 1) % len(nodes)][local]
            self.before = nodes[at - 1][local]
        elif rank() == 0:
            why = "there is one node" if len(nodes) == 1 else "the nodes have different numbers of processes"
            print(f"copies in memory have no peer, since {why}: they outlive the run, not a node", flush=True)

    def path(self, step: int) -> Path:
        """The copy after `step` steps, here."""
        return self.place / RunDir("").checkpoint(step).name

    def save(self, *arguments: Any) -> Remembered:
        """What Saver.save makes instead of a checkpoint on the disk."""
        return Remembered(self, *arguments)

    def drop(self, *, but: Callable[[Path], bool] = lambda copy: False) -> None:
        """Delete copies of this run on this node, all or those alone that `but` does not keep.

        Interrupted, it leaves nothing with a manifest. What the system refuses to delete stays.
        """
        if not self.leads:
            return
        for copy in self.place.glob("step_*"):
            if not but(copy):
                with suppress(OSError):
                    (copy / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(copy, ignore_errors=True)


class Remembered(Save):
    """One copy on its way: written by a thread as a checkpoint is, sent to the peer by `publish`."""

    def __init__(self, memory: Memory, *arguments: Any) -> None:
        self._memory = memory
        super().__init__(*arguments)

    def _begin(self) -> Path:
        self._memory.drop(but=lambda copy: copy != self.final and (copy / MANIFEST).is_file())
        barrier()
        return self.final

    def _write(self) -> None:
        try:
            self._memory.place.mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in self._contents:
                (self._aside / name).mkdir(parents=True, exist_ok=True)
            if rank() == 0:
                carried.write(self._carried_along, self._aside)
        except OSError as error:
            self._written = reason(error)
            return
        super()._write()

    def publish(self) -> None:
        """Wait for every rank's part, give it to the peer, commit, and delete the copies before.

        Raises OSError, on every rank alike, where a node has no room; what it has of this copy is deleted.
        """
        self._thread.join()
        why, content = from_first_rank(self._described, on_first_rank(self._written))
        if not why:
            why = _first(gathered(self._exchange(Checkpoint.of(self.final, content).manifest.files)))
        if not why:
            why = _first(gathered(self._commit(content)))
        self._memory.drop(but=lambda copy: (copy == self.final) != bool(why))
        if why:
            raise OSError(f"no copy in memory of step {self.manifest.step}: {why}")

    def _described(self, written: list[Any]) -> tuple[str, bytes]:
        """Why the files cannot be described, or the manifest of all; of the first rank."""
        if why := self._index(written):
            return why, b""
        try:
            return "", publish.completed(self._aside, self.manifest, records_of(written)).content()
        except OSError as error:
            return reason(error), b""

    def _commit(self, content: bytes) -> str:
        if not self._memory.leads:
            return ""
        try:
            (self._aside / MANIFEST).write_bytes(content)
        except OSError as error:
            return reason(error)
        return ""

    def _exchange(self, files: Mapping[str, dict[str, Any]]) -> str:
        """Send what this rank wrote, and keep what comes; why that failed here, empty where it did not.

        A rank that fails goes on sending and receiving, so that none waits for it.
        """
        why = ""
        if self._memory.peer is None or self._memory.before is None:
            return why
        mine = {name: record for name, record in files.items() if writer_of(name) == rank()}
        theirs = {name: record for name, record in files.items() if writer_of(name) == self._memory.before}
        for name in theirs:
            try:
                (self._aside / name).parent.mkdir(parents=True, exist_ok=True)
                (self._aside / name).touch()
            except OSError as error:
                why = reason(error)
        for outgoing, incoming in zip_longest(_pieces(mine), _pieces(theirs)):
            messages, arrived = [], None
            if outgoing is not None:
                content = torch.zeros(outgoing[2], dtype=torch.uint8)
                why = _read(self._aside, outgoing, content) or why
                sent = content.to(device.device())
                messages.append(dist.P2POp(dist.isend, sent, self._memory.peer))
            if incoming is not None:
                arrived = torch.empty(incoming[2], dtype=torch.uint8, device=device.device())
                messages.append(dist.P2POp(dist.irecv, arrived, self._memory.before))
            for message in dist.batch_isend_irecv(messages):
                message.wait()
            if incoming is not None and arrived is not None and not why:
                why = _append(self._aside, incoming, arrived.cpu())
        return why


type Piece = tuple[str, int, int]
"""A file's name, and the first byte and number of bytes of a part of it."""


def writer_of(name: str) -> int:
    """The rank that has written a file of a checkpoint; the first one writes those that do not say it."""
    named = re.search(r"/__(\d+)_\d+\.distcp$", name)
    return int(named[1]) if named else 0


def _pieces(files: Mapping[str, dict[str, Any]]) -> Iterator[Piece]:
    for name, record in sorted(files.items()):
        for start in range(0, record["bytes"], CHUNK_BYTES):
            yield name, start, min(CHUNK_BYTES, record["bytes"] - start)


def _read(folder: Path, piece: Piece, into: torch.Tensor) -> str:
    name, start, size = piece
    try:
        with open(folder / name, "rb") as file:
            file.seek(start)
            if file.readinto(into.numpy()) != size:  # type: ignore[arg-type]
                return f"{folder / name} ends early"
    except OSError as error:
        return reason(error)
    return ""


def _append(folder: Path, piece: Piece, content: torch.Tensor) -> str:
    try:
        with open(folder / piece[0], "ab") as file:
            file.write(content.numpy())  # type: ignore[arg-type]
    except OSError as error:
        return reason(error)
    return ""


def _first(reasons: list[str]) -> str:
    return next((each for each in reasons if each), "")


def _made_run_id(run_dir: Path) -> str:
    if not run_id(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        RunDir(run_dir).identity.write_text(secrets.token_hex(16) + "\n")
    return run_id(run_dir)
