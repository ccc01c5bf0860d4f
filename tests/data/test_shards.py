"""What an entry of data.path names is one corpus, and what is known of its files is not found out twice."""

from pathlib import Path

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import DataConfig
from llada_megatron.data import shards
from llada_megatron.data.fingerprint import fingerprint, fingerprint_difference
from llada_megatron.data.prepare import prepare_corpus
from tests.data.test_packed import L, build, folders_of, lengths_of, tokens_of, write_corpus


@pytest.fixture
def data(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", lengths_of(80))
    return DataConfig(path=[prefix], sequence_length=L, split="9,1")


def write_shards(tmp_path, documents=(30, 1, 20)):
    """Shards of one domain, numbered on, and the same documents as one corpus."""
    folder, first = tmp_path / "web", 0
    folder.mkdir()
    for number, count in enumerate(documents):
        write_corpus(folder / f"part_{number}", lengths_of(sum(documents))[first : first + count], first)
        first += count
    write_corpus(tmp_path / "whole", lengths_of(sum(documents)))
    return str(folder)


@pytest.mark.parametrize("entry", ["web", "web/part_*"])
def test_the_shards_of_a_folder_or_a_pattern_are_one_corpus(tmp_path, entry):
    write_shards(tmp_path)
    shared = dict(sequence_length=L, split="1,0")
    one = build(DataConfig(path=[f"{tmp_path}/{entry}"], **shared))
    whole = build(DataConfig(path=[f"{tmp_path}/whole"], **shared))
    count = 2 * whole.sequences_per_epoch
    assert tokens_of(one, count) == tokens_of(whole, count)
    assert len(one.readings) == 1
    assert len(folders_of(shards.cache_of(DataConfig(path=[f"{tmp_path}/{entry}"])))) == 1
    assert one[0].place_of(50) == (f"{tmp_path}/web/part_2", 19)


def test_each_shard_keeps_its_own_tail_for_validation(tmp_path):
    write_shards(tmp_path)
    data = DataConfig(path=[f"{tmp_path}/web"], sequence_length=L, split="9,1")
    held_out, train = (
        {token // 1000 for tokens in tokens_of(part, part.sequences_per_epoch) for token in tokens}
        for part in (build(data, "validation"), build(data))
    )
    assert held_out <= {27, 28, 29, 49, 50} and held_out & {27, 28, 29} and held_out & {49, 50}
    assert train <= {*range(27), *range(30, 49)}


def test_a_shard_that_is_added_is_another_corpus(tmp_path):
    folder = write_shards(tmp_path)
    data = DataConfig(path=[folder], sequence_length=L)
    saved = fingerprint(data)
    assert saved["corpora"][0]["shards"] == 3
    write_corpus(Path(folder) / "part_9", [20])
    assert "data.path[0] had 3 shards and has 4 now." in fingerprint_difference(saved, fingerprint(data))


def test_a_folder_without_corpora_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"where no \.idx lies: name a prefix, a folder or a pattern"):
        build(DataConfig(path=[str(tmp_path)], sequence_length=L))


def test_what_a_shard_holds_is_found_out_once_until_its_files_change(data, monkeypatch):
    looks = []
    real = shards.described
    monkeypatch.setattr(shards, "described", lambda *args: looks.append(1) or real(*args))
    first = fingerprint(data)
    assert fingerprint(data) == first and len(looks) == 1
    write_corpus(data.path[0], lengths_of(80), token_of=lambda token: token + (token == 40_000))
    assert fingerprint(data) != first and len(looks) == 2


def test_a_prepared_corpus_tells_its_digests_and_they_are_those_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc" * L)
    prepare_corpus([tmp_path / "a.txt"], tmp_path / "text", workers=1)
    data = DataConfig(path=[f"{tmp_path}/text"], sequence_length=L, split="1,0")
    with monkeypatch.context() as patch:
        patch.setattr(shards, "described", None)
        patch.setattr(shards, "read_index", None)
        told = fingerprint(data)
        build(data, mask_token_id=257)
    (tmp_path / "text.json").unlink()
    assert fingerprint(data) == told
