"""Copies of a run's checkpoints in another place, such as an object store, through fsspec.

URL/step_00000012/ holds the files of a checkpoint under their names, URL/records/ what the run has written
beside its checkpoints. An object store cannot rename, so the manifest is what commits: it is copied when
everything else is there, and what has none is never looked for.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from llada_megatron.checkpoint import publish
from llada_megatron.checkpoint.retention import unkept
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import CheckpointConfig
from llada_megatron.parallel.ranks import barrier, from_first_rank, gathered, on_first_rank, rank, ranks, warn
from llada_megatron.record import events
from llada_megatron.record.manifest import Checkpoint
from llada_megatron.record.run_dir import MANIFEST, RunDir, step_of
from llada_megatron.runtime import device

RECORDS = "records"
PROBE = "probe"


class Place:
    """A folder that a URL names; the methods are for one process."""

    def __init__(self, url: str) -> None:
        """Raises BadInput for a URL that fsspec has no file system for."""
        import fsspec

        self.url = url.rstrip("/")
        try:
            self._files, root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # ImportError says which package to install
            raise BadInput(f"{url} cannot be used: {error}. Install it, or choose another place.") from None
        self._root = str(root).rstrip("/")

    def check(self) -> None:
        """Raises BadInput where nothing can be written."""
        try:
            self.write(PROBE, b"")
            self._files.rm_file(f"{self._root}/{PROBE}")
        except Exception as error:  # of whatever library serves the URL
            raise BadInput(f"{self.url} cannot be written to: {_in_words(error)}.") from error

    def put(self, file: Path, name: str) -> None:
        """Copy a file there."""
        to = f"{self._root}/{name}"
        self._files.makedirs(to.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(file), to)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        to = f"{self._root}/{name}"
        self._files.makedirs(to.rpartition("/")[0], exist_ok=True)
        self._files.pipe_file(to, content)

    def get(self, name: str, file: Path) -> None:
        """Copy a file here."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._files.get_file(f"{self._root}/{name}", str(file))

    def names_in(self, folder: str = "") -> list[str]:
        """The names of what lies in a folder of it; none where there is no such folder."""
        self._files.invalidate_cache()
        path = f"{self._root}/{folder}".rstrip("/")
        found = self._files.ls(path, detail=False) if self._files.exists(path) else []
        return sorted(str(each).rstrip("/").rpartition("/")[2] for each in found)

    def checkpoints(self) -> list[Checkpoint]:
        """Whole ones, oldest first, their paths being names in this folder; damaged manifests are named."""
        found = []
        for name in self.names_in():
            if step_of(Path(name)) is None or not self._files.exists(f"{self._root}/{name}/{MANIFEST}"):
                continue
            content = self._files.cat_file(f"{self._root}/{name}/{MANIFEST}")
            try:
                found.append(Checkpoint.of(Path(name), content))
            except BadInput as fault:
                warn(f"in {self.url}, {fault}")
        return found

    def remove(self, name: str) -> None:
        """Delete a checkpoint; interrupted, it leaves nothing with a manifest."""
        self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")
        self._files.rm(f"{self._root}/{name}", recursive=True)


class Copying:
    """Copies one checkpoint of this run after the other, by threads; every rank calls each method alike.

    A copy that fails is said and recorded, and the run goes on: its checkpoints are where it saves them.
    """

    def __init__(self, run_dir: Path, settings: CheckpointConfig) -> None:
        """Raises BadInput, on every rank alike, for a place that cannot be written to."""
        self._files, self._settings, self._place = RunDir(run_dir), settings, Place(settings.copy_to)
        from_first_rank(self._place.check)
        self._thread: threading.Thread | None = None
        self._checkpoint: Path | None = None
        self._failure = ""

    def begin(self, checkpoint: Path) -> None:
        """Copy a checkpoint that has its name; the one before must have been finished."""
        assert self._thread is None
        self._checkpoint, self._failure = checkpoint, ""
        self._thread = threading.Thread(target=self._copy, args=(checkpoint,), daemon=True)
        self._thread.start()

    def _copy(self, checkpoint: Path) -> None:
        """The files that this rank has written; the manifest waits for those of all (`finish`)."""
        try:
            names = publish.written_here(list(Checkpoint.read(checkpoint).manifest.files))
            with ThreadPoolExecutor(self._settings.writer_threads) as pool:
                put = partial(_put, self._place, checkpoint)
                list(pool.map(put, names))  # raises what one of them raised
        except Exception as error:  # of a thread, so `finish` says it
            self._failure = _in_words(error)

    @property
    def is_busy(self) -> bool:
        """Whether a copy has begun that is not finished; the same on every rank."""
        return self._thread is not None

    def is_copied(self) -> bool:
        """Whether every rank has copied its files, so that `finish` will not wait."""
        alive = self._thread is not None and self._thread.is_alive()
        waiting = torch.tensor(int(alive), dtype=torch.int32, device=device.device())
        dist.all_reduce(waiting, op=dist.ReduceOp.MAX)
        return not int(waiting)

    def finish(self) -> None:
        """Wait for the copy that is under way, commit it, and delete those that nothing keeps."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failures = [failure for failure in on_first_rank(self._failure) if failure]
        if rank() == 0:
            assert self._checkpoint is not None
            failure = failures[0] if failures else self._commit(self._checkpoint)
            step = step_of(self._checkpoint)
            if failure:
                warn(f"{self._checkpoint.name} could not be copied to {self._place.url}: {failure}")
                events.append(self._files.path, "not_copied", step=step, why=failure)
            else:
                events.append(self._files.path, "copied", step=step, to=self._place.url)
        barrier()

    def _commit(self, checkpoint: Path) -> str:
        """Copy the manifest and the run's records; why that failed, empty where it did not."""
        try:
            self._place.put(checkpoint / MANIFEST, f"{checkpoint.name}/{MANIFEST}")
            for file in self._files.records:
                if file.is_file():
                    self._place.put(file, f"{RECORDS}/{file.name}")
            for path in unkept(self._place.checkpoints(), self._settings):
                self._place.remove(path.name)
        except Exception as error:  # of whatever library serves the URL
            return _in_words(error)
        return ""


def _put(place: Place, checkpoint: Path, name: str) -> None:
    place.put(checkpoint / name, f"{checkpoint.name}/{name}")


def fetch_newer(run_dir: Path, url: str) -> None:
    """Bring the newest checkpoint that was copied to a URL back, where run_dir has none that is as new.

    Every rank calls it and copies a part. What the run wrote beside its checkpoints comes back where nothing
    of it is here. Raises BadInput where the place cannot be read.
    """
    place = Place(url)
    newest = from_first_rank(_newest, place)
    if newest is None or newest.manifest.step <= from_first_rank(RunDir(run_dir).newest_step):
        return
    final = RunDir(run_dir).checkpoints / newest.path
    if rank() == 0:
        print(f"{final.name} comes from {url}: {run_dir} has none that is as new", flush=True)
    fetch(place, newest, final)
    from_first_rank(_fetch_records, place, run_dir)


def _fetch_records(place: Place, run_dir: Path) -> None:
    missing = [file for file in RunDir(run_dir).records if not file.exists()]
    try:
        there = place.names_in(RECORDS)
        for file in missing:
            if file.name in there:
                place.get(f"{RECORDS}/{file.name}", file)
    except Exception as error:  # of whatever library serves the URL
        raise BadInput(f"{place.url}/{RECORDS} cannot be copied: {_in_words(error)}.") from error


def _newest(place: Place) -> Checkpoint | None:
    try:
        return max(place.checkpoints(), key=lambda each: each.manifest.step, default=None)
    except Exception as error:  # of whatever library serves the URL
        raise BadInput(f"{place.url} cannot be read: {_in_words(error)}.") from error


def fetch(place: Place, checkpoint: Checkpoint, final: Path) -> None:
    """Copy a checkpoint of a place here, under a name that it gets when it is whole; every rank calls it.

    Raises BadInput, on every rank alike, where a file cannot be copied. Digests are for who loads it.
    """
    aside = publish.begin(final)
    names = sorted(checkpoint.manifest.files)[rank() :: ranks()]
    why = ""
    try:
        with ThreadPoolExecutor(publish.THREADS) as pool:
            list(pool.map(lambda name: place.get(f"{checkpoint.path}/{name}", aside / name), names))
        if rank() == 0:
            place.get(f"{checkpoint.path}/{MANIFEST}", aside / MANIFEST)
    except Exception as error:  # of whatever library serves the URL
        why = _in_words(error)
    if failures := [each for each in gathered(why) if each]:
        raise BadInput(f"{place.url}/{checkpoint.path} cannot be copied: {failures[0]}.")
    if rank() == 0:
        publish.give_name(aside, final)
    barrier()


def _in_words(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
