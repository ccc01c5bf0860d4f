"""Indices on disk are whole, or built again and said; nothing in them is unpickled."""

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import DataConfig
from llada_megatron.data import index_cache
from llada_megatron.data.index_cache import DIGESTS
from tests.data.test_packed import L, build, folders_of, lengths_of, tokens_of, write_corpus


@pytest.fixture
def data(tmp_path):
    paths = [write_corpus(tmp_path / name, lengths_of(40, seed)) for seed, name in enumerate("ab")]
    return DataConfig(path=paths, sequence_length=L, split="9,1", cache_dir=str(tmp_path / "cache"))


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def header_alone(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:128])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(1000))


def zeros_of_the_same_length(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def other_values(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def header_of_a_petabyte(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"'shape': (", b"'shape': (999999999999999, "))


def broken_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"{'descr'", b"{{'descr"))


def pickled_objects(path: Path) -> None:
    numpy.save(path, numpy.array([Payload()], dtype=object), allow_pickle=True)


def bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


def archive(path: Path) -> None:
    with open(path, "wb") as file:
        numpy.savez(file, numpy.arange(4))


def floats(path: Path) -> None:
    numpy.save(path, numpy.arange(8.0))


def missing(path: Path) -> None:
    path.unlink()


FAULTS = [
    truncated, header_alone, empty, noise, zeros_of_the_same_length, other_values, header_of_a_petabyte,
    broken_header, pickled_objects, bare_pickle, archive, floats, missing,
]  # fmt: skip
SEEN_WITHOUT_DIGESTS = [fault for fault in FAULTS if fault is not other_values]


def check_that_it_is_rebuilt(data, capfd, fault, pattern):
    data.path = data.path[:1]
    before = tokens_of(build(data), 64)
    (path,) = Path(data.cache_dir).glob(f"*/*{pattern}")
    content = path.read_bytes()
    fault(path)
    assert tokens_of(build(data), 64) == before
    said = capfd.readouterr().err
    assert f"the indices in {path.parent} are damaged (" in said
    assert "they are built again" in said
    assert path.read_bytes() == content
    assert not Path("ran").exists()
    assert len(folders_of(data.cache_dir)) == 1
    tokens_of(build(data), 64)
    assert "damaged" not in capfd.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_index_is_built_again_and_said(data, tmp_path, monkeypatch, capfd, fault):
    monkeypatch.chdir(tmp_path)
    check_that_it_is_rebuilt(data, capfd, fault, "-sample_index.npy")


@pytest.mark.parametrize("part", ["document_index", "shuffle_index"])
def test_every_index_of_a_member_is_checked(data, capfd, part):
    data.path = data.path[:1]
    build(data)
    (path,) = Path(data.cache_dir).glob(f"*/*{part}.npy")
    truncated(path)
    build(data)
    assert part in capfd.readouterr().err


@pytest.mark.parametrize("fault", [missing, empty])
def test_a_lost_description_is_damage(data, capfd, fault):
    data.path = data.path[:1]
    build(data)
    (path,) = Path(data.cache_dir).glob("*/*description.txt")
    fault(path)
    build(data)
    assert "description" in capfd.readouterr().err


@pytest.mark.parametrize("fault", SEEN_WITHOUT_DIGESTS)
def test_a_folder_without_digests_is_checked_by_its_headers(data, fault):
    data.path = data.path[:1]
    build(data)
    (folder,) = folders_of(data.cache_dir)
    (folder / DIGESTS).unlink()
    parts = ("document_index", "sample_index", "shuffle_index")
    assert index_cache.damage(folder, parts) is None
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    build(data)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times  # used as it is
    (path,) = folder.glob("*shuffle_index.npy")
    fault(path)
    assert "shuffle_index" in index_cache.damage(folder, parts)


@pytest.mark.parametrize("content", ["", "[1]", "3", "[" * 100_000, json.dumps({"a": "b"})])
def test_damaged_digests_are_damage(data, capfd, content):
    data.path = data.path[:1]
    build(data)
    (folder,) = folders_of(data.cache_dir)
    (folder / DIGESTS).write_text(content)
    build(data)
    assert "are damaged" in capfd.readouterr().err


def test_a_folder_that_cannot_be_replaced_is_named(data, monkeypatch):
    data.path = data.path[:1]
    build(data)
    (folder,) = folders_of(data.cache_dir)
    empty(next(folder.glob("*shuffle_index.npy")))
    monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(PermissionError(13, "denied")))
    with pytest.raises(BadInput, match=rf"{folder} is damaged and cannot be removed \(denied\): delete it"):
        build(data)


def test_files_are_on_disk_before_the_folder_has_its_name(data, monkeypatch):
    written, renamed = [], []
    real = Path.rename
    monkeypatch.setattr(index_cache, "write_out", lambda paths: written.append([path.name for path in paths]))
    monkeypatch.setattr(Path, "rename", lambda *paths: renamed.append(len(written)) or real(*paths))
    data.path = data.path[:1]
    build(data)
    folder = folders_of(data.cache_dir)[0]
    assert renamed[-1:] == [1]  # after the first call, which had all of its files
    assert {path.name for path in folder.iterdir()} < {*written[0]}
    shutil.rmtree(folder)
