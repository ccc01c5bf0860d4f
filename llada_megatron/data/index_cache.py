"""megatron-core's indices on disk: built once, whole or not there, checked before they are trusted.

A folder is named by the identity of what is in it. It is filled aside, written out and renamed, with the
digests of its files in `sha256.json`. megatron-core itself writes in place, trusts what it finds and would
unpickle it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import megatron.core
import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.data.durable import write_out
from llada_megatron.parallel.ranks import warn

DIGESTS = "sha256.json"


def filled(
    root: Path, identity: dict[str, Any], parts: Sequence[str], build: Callable[[Path], object]
) -> Path:
    """The folder of these indices, whole: as it is found, or after `build(folder)` has filled it.

    parts: names of the arrays that megatron-core keeps there. A damaged folder is built again, and said. For
    one process; the others are told. Raises BadInput where the folder cannot be written.
    """
    content = json.dumps({"megatron_core": megatron.core.__version__, **identity}, sort_keys=True)
    folder = root / hashlib.sha256(content.encode()).hexdigest()[:32]
    _fill(folder, parts, build)
    return folder


def loaded(folder: Path, part: str) -> numpy.ndarray:
    """One of the arrays of a folder that was found whole, memory-mapped."""
    (path,) = folder.glob(f"*-{part}.npy")
    return numpy.load(path, mmap_mode="r", allow_pickle=False)


def damage(folder: Path, parts: Sequence[str]) -> str | None:
    """Return what is wrong with a folder of indices, as a phrase, or None. Nothing is unpickled."""
    if not list(folder.glob("*-description.txt")):
        return "its description is missing"
    for part in parts:
        paths = list(folder.glob(f"*-{part}.npy"))
        if len(paths) != 1:
            return f"{part}.npy is missing"
        try:
            array = numpy.load(paths[0], mmap_mode="r", allow_pickle=False)
        except Exception as error:  # whatever a damaged header makes numpy raise
            return f"{paths[0].name}: {error}"
        if not isinstance(array, numpy.ndarray) or array.dtype.kind not in "iu":
            return f"{paths[0].name} holds no integers"
    try:
        expected = dict(json.loads((folder / DIGESTS).read_bytes()))
    except FileNotFoundError:
        return None  # an earlier version wrote it
    except (ValueError, TypeError, RecursionError) as error:
        return f"{DIGESTS}: {error}"
    changed = [name for name, digest in _digests(folder).items() if digest != expected.get(name)]
    return f"{changed[0]} has other content" if changed else None


def _fill(folder: Path, parts: Sequence[str], build: Callable[[Path], object]) -> None:
    if folder.is_dir():
        trouble = damage(folder, parts)
        if trouble is None:
            return
        warn(f"the indices in {folder} are damaged ({trouble}): they are built again")
        _remove(folder)
    aside = _beside(folder, "partial")
    try:
        aside.mkdir(parents=True)
        build(aside)
        (aside / DIGESTS).write_text(json.dumps(_digests(aside), indent=1) + "\n")
        write_out([*aside.iterdir(), aside])
        aside.rename(folder)
        write_out([folder.parent])
    except OSError as error:
        if not folder.is_dir():  # else another process was faster
            raise BadInput(
                f"Indices cannot be written under {folder.parent} ({error.strerror}): set data.cache_dir."
            ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _remove(folder: Path) -> None:
    aside = _beside(folder, "damaged")
    try:
        folder.rename(aside)  # at once, whoever else looks
    except FileNotFoundError:
        return
    except OSError as error:
        raise BadInput(f"{folder} is damaged and cannot be removed ({error.strerror}): delete it.") from error
    shutil.rmtree(aside, ignore_errors=True)


def _beside(folder: Path, why: str) -> Path:
    return folder.with_name(f"{folder.name}.{why}-{socket.gethostname()}-{os.getpid()}")


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != DIGESTS:
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
