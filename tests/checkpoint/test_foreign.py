"""A stranger's checkpoint: what could run code is refused in a sentence wherever it lies, and never runs."""

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llada_megatron import cli
from llada_megatron.config.errors import BadInput
from llada_megatron.record.manifest import Checkpoint, file_record
from tests.distributed import run_ranks

OLD = Path(__file__).parents[1] / "old_run"
WEIGHT = "embedding.word_embeddings.weight"
MOMENT = "optimizer.state.exp_avg.embedding.word_embeddings.weight"


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> object:
        return os.mkdir, (self.trace,)


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def metadata_of(shards: Path) -> object:
    with open(shards / ".metadata", "rb") as file:
        return pickle.load(file)


def in_metadata(shards: Path, trace: Path) -> None:
    metadata = metadata_of(shards)
    metadata.planner_data = Payload(trace)
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))


def instead_of_metadata(shards: Path, trace: Path) -> None:
    (shards / ".metadata").write_bytes(pickle.dumps(Payload(trace), protocol=0))


def in_a_legacy_common_file(shards: Path, trace: Path) -> None:
    (shards / "common.pt").write_bytes(saved({"args": Payload(trace)}))


def in_shard(name: str) -> Callable[[Path, Path], None]:
    """Points the index at a payload behind everything else in the file of the shards."""

    def plant(shards: Path, trace: Path) -> None:
        metadata = metadata_of(shards)
        [index] = [each for each in metadata.storage_data if each.fqn == name]
        file, payload = shards / metadata.storage_data[index].relative_path, saved([Payload(trace)] * 9999)
        metadata.storage_data[index].offset = file.stat().st_size
        metadata.storage_data[index].length = len(payload)
        with file.open("ab") as end:
            end.write(payload)
        (shards / ".metadata").write_bytes(pickle.dumps(metadata))

    return plant


PLACES = {
    "metadata": in_metadata,
    "whole metadata": instead_of_metadata,
    "common.pt": in_a_legacy_common_file,
    "common state": in_shard("common_state/shard_0_1"),
    "weight": in_shard(WEIGHT),
    "moment": in_shard(MOMENT),
}
READ_BY_WEIGHTS_ALONE = ("metadata", "whole metadata", "weight")


def planted(folder: Path, place: str) -> Path:
    """A run whose only checkpoint holds a payload, under a manifest that agrees with it."""
    run = folder / place / "run"
    shutil.copytree(OLD, run.parent)
    [path] = (run / "checkpoints").iterdir()
    PLACES[place](path / "shards", folder / f"trace of {place}")
    manifest = Checkpoint.read(path).manifest
    manifest.files = {f"shards/{file.name}": file_record(file) for file in (path / "shards").iterdir()}
    manifest.write(path)
    return run


def refusals(folder: Path) -> dict[tuple[str, str], str]:
    from llada_megatron.checkpoint.shards import ShardsReader, whole
    from llada_megatron.config import compose
    from llada_megatron.training import loop

    def resume(run: Path) -> None:
        os.chdir(run.parent)
        loop.run(compose.load("run/config.yaml"))

    def weights(run: Path) -> None:
        reader = ShardsReader(next((run / "checkpoints").iterdir()) / "shards")
        for name, shape in reader.shapes().items():
            reader.read(whole(name, *shape))

    readers = {"resume": resume, "weights": weights}
    found = {}
    for place in PLACES:
        for verb, read in readers.items():
            try:
                read(planted(folder / verb, place))
            except BadInput as refusal:
                found[verb, place] = str(refusal)
    return found


def test_a_payload_is_refused_and_does_not_run(tmp_path):
    [found] = run_ranks(refusals, tmp_path)
    expected = {("resume", place) for place in PLACES} | {
        ("weights", place) for place in READ_BY_WEIGHTS_ALONE
    }
    assert set(found) == expected
    for sentence in found.values():
        assert "posix.mkdir, which could run code" in sentence and "\n" not in sentence
        assert str(tmp_path) in sentence or "step_00000003" in sentence
    assert not list(tmp_path.rglob("trace of *"))
    pickle.loads(pickle.dumps(Payload(tmp_path / "trace of itself")))
    assert (tmp_path / "trace of itself").is_dir()  # it would have run


@pytest.mark.parametrize("verb", ["evaluate", "checkpoint diff", "convert mcore-to-hf", "checkpoint merge"])
def test_every_verb_that_takes_a_checkpoint_ends_with_exit_code_2(tmp_path, capsys, verb):
    run = planted(tmp_path, "whole metadata")
    command = {
        "evaluate": ["evaluate", str(run), f"data.path=[{OLD}/corpus/text]"],
        "checkpoint diff": ["checkpoint", "diff", str(run), str(run)],
        "convert mcore-to-hf": ["convert", "mcore-to-hf", "--from", str(run), "--to", str(tmp_path / "out")],
        "checkpoint merge": ["checkpoint", "merge", str(run), "--top-k", "1", "--metric", "nll_block4"],
    }[verb]
    assert cli.main(command) == 2
    assert "asks for posix.mkdir, which could run code" in capsys.readouterr().err
    assert not list(tmp_path.rglob("trace of *"))
