"""Which files of a Hugging Face folder hold its tensors, and which only lie beside them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import read_json, require

REMEDY = "give the directory of a Hugging Face checkpoint"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
SHARDS = "model-*-of-*.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
OTHER_WEIGHTS = ("*.safetensors", *PICKLED, "*.gguf")


@dataclass(frozen=True)
class WeightFiles:
    """The files that a checkpoint is read from."""

    paths: list[Path]
    file_of: dict[str, str] | None
    """File by tensor, as the index says; None where one file holds everything."""
    unread: list[str]
    """Names of other files with weights in the folder: adapters, copies in another format."""


def weight_files(directory: Path) -> WeightFiles:
    """The files of a folder's checkpoint: `model.safetensors`, or the shards that the index names.

    Raises BadInput, in one sentence, where that is not certain: a folder with both, since readers differ in
    which one they take, shards without an index, an index that is none, files that are missing or elsewhere.
    """
    if not directory.is_dir():
        raise BadInput(f"{directory} is no directory: give that of a Hugging Face checkpoint.")
    file_of = _index(directory / INDEX) if (directory / INDEX).is_file() else None
    names = sorted(set(file_of.values())) if file_of is not None else [SINGLE]
    has_single = (directory / SINGLE).is_file()
    if has_single and SINGLE not in names:
        raise BadInput(
            f"{directory} holds {SINGLE} and, by {INDEX}, {names[0]}: readers differ in which of the two they"
            " take, so remove the one that is not meant."
        )
    shards = sorted(path.name for path in directory.glob(SHARDS))
    if file_of is None and shards:
        raise BadInput(
            f"{directory} holds {shards[0]} without {INDEX}: copy the index too"
            + (f", or remove the shards if {SINGLE} is meant." if has_single else ".")
        )
    if file_of is None and not has_single:
        raise BadInput(_without_weights(directory))
    for name in names:
        if not (directory / name).is_file():
            raise BadInput(f"{directory} holds no {name}: give the directory of a complete checkpoint.")
    return WeightFiles([directory / name for name in names], file_of, _others(directory, names))


def _index(path: Path) -> dict[str, str]:
    """File by tensor; the files are names in the index's own folder."""
    index = read_json(path, REMEDY)
    require(index, path, "weight_map", remedy=REMEDY)
    file_of = index["weight_map"]
    if not isinstance(file_of, dict) or not file_of:
        raise BadInput(f"{path} has a 'weight_map' that names no file of any tensor: copy the index again.")
    for tensor, name in file_of.items():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise BadInput(
                f"{path} places {tensor} in {name!r}, which names no safetensors file of its folder: copy the"
                " index again."
            )
    return file_of


def _others(directory: Path, names: list[str]) -> list[str]:
    found = {path.name for pattern in OTHER_WEIGHTS for path in directory.glob(pattern)}
    return sorted(found - set(names))


def _without_weights(directory: Path) -> str:
    """Why a folder without index and `model.safetensors` cannot be read."""
    pickled = sorted(path.name for pattern in PICKLED for path in directory.glob(pattern))
    others = [name for name in _others(directory, []) if name not in pickled]
    if any(name.startswith("adapter_") for name in others):
        return (
            f"{directory} holds an adapter ({', '.join(others)}) without the model that it adapts: merge it"
            f" into that model and save the result as {SINGLE}."
        )
    if others:
        return (
            f"{directory} holds no {SINGLE}, and {', '.join(others)} is not read under its name: give the"
            " directory of a complete checkpoint."
        )
    if pickled:
        return (
            f"{directory} holds pickled weights ({pickled[0]}), which can run any code and are not read:"
            " save them as safetensors."
        )
    return f"{directory} holds no {SINGLE}: give the directory of a complete checkpoint."
