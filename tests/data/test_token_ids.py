"""Ids outside the vocabulary are found before a model meets them, in one reading whose result is kept."""

import json
import os
import struct

import numpy
import pytest

from llada_megatron.commands import data as command
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import DataConfig
from llada_megatron.data import token_ids
from llada_megatron.data.corpus import read_index
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.data.shards import survey
from llada_megatron.data.token_ids import Outside, id_range, outside
from tests.distributed import run_ranks

CODES = {"int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}


def write(prefix, documents, dtype="int32", order=None):
    """Token files by hand; `order`: of the documents in the .bin, where the .idx keeps theirs."""
    item = numpy.dtype(dtype).itemsize
    offsets, content = {}, b""
    for number in order or range(len(documents)):
        offsets[number] = len(content)
        content += numpy.array(documents[number]).astype(dtype).tobytes()
    count = len(documents)
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, CODES[dtype], count, count + 1)
    arrays = [
        numpy.array([len(document) for document in documents], "<i4"),
        numpy.array([offsets[number] for number in range(count)], "<i8"),
        numpy.arange(count + 1, dtype="<i8"),
    ]
    prefix.with_suffix(".bin").write_bytes(content)
    prefix.with_suffix(".idx").write_bytes(header + b"".join(array.tobytes() for array in arrays))
    assert len(content) == item * sum(map(len, documents))
    return read_index(str(prefix))


NO_MASK = 2**40


def check_ids(corpus, vocab_size, cache, mask_token_id=NO_MASK):
    """Of one corpus, as it is now."""
    data = DataConfig(path=[corpus.prefix], sequence_length=1, cache_dir=str(cache))
    token_ids.check_ids(survey(data), vocab_size, mask_token_id, cache)


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_ids_outside_are_counted_and_the_first_is_named(tmp_path, monkeypatch, block):
    monkeypatch.setattr(token_ids, "BLOCK_TOKENS", block)
    documents = [[1, 2], [], [3, 99, -4], [5], [99, 99]]
    corpus = write(tmp_path / "corpus", documents)
    assert id_range(corpus) == (-4, 99)
    assert outside(corpus, 99) == Outside(4, 2, document=2, position=1, token_id=99)
    assert outside(corpus, 100) == Outside(1, 1, document=2, position=2, token_id=-4)
    parts = [token_ids._ids(corpus.prefix, corpus.dtype, 99, part, 3) for part in range(3)]
    assert token_ids._united(parts) == token_ids.Ids(-4, 99, mask_token_id=99, masked=3)


def test_documents_in_any_order_of_the_bin_are_named_by_the_idx(tmp_path):
    corpus = write(tmp_path / "corpus", [[1], [99, 2], [3, 98]], order=[2, 0, 1])
    assert outside(corpus, 50) == Outside(2, 2, document=2, position=1, token_id=98)


def test_ids_between_documents_are_no_fault(tmp_path):
    write(tmp_path / "corpus", [[1], [99, 99], [2]])
    content = bytearray((tmp_path / "corpus.idx").read_bytes())
    content[34 + 4 : 34 + 8] = bytes(4)  # the middle document becomes empty
    (tmp_path / "corpus.idx").write_bytes(content)
    corpus = read_index(str(tmp_path / "corpus"))
    assert outside(corpus, 50) is None
    check_ids(corpus, 50, tmp_path / "cache")


@pytest.mark.parametrize(
    ("dtype", "value", "vocab_size", "message"),
    [
        (
            "int32",
            -1,
            100,
            r"corpus\.bin: document 1 \(counted from 0\) holds the id -1 at its token 0; 1 ids",
        ),
        ("int32", 100, 100, r"holds the id 100 .* outside 0\.\.99: .*model\.vocab_size"),
        ("int64", 2**40, 100, "holds the id 1099511627776"),
        ("uint16", 65535, 65535, "holds the id 65535"),
        ("int16", -5536, 65536, r"holds the id -5536 .*as uint16 this one would be 60000"),
        ("int8", -1, 100, "holds the id -1"),
    ],
)
def test_an_id_outside_is_refused_by_file_and_document(tmp_path, dtype, value, vocab_size, message):
    corpus = write(tmp_path / "corpus", [[0, 1], [value]], dtype)
    for _ in range(2):  # the second time from what is remembered
        with pytest.raises(BadInput, match=message):
            check_ids(corpus, vocab_size, tmp_path / "cache")


def test_a_corpus_is_read_through_once_until_it_changes(tmp_path, monkeypatch):
    reads = []
    real = token_ids._part
    monkeypatch.setattr(token_ids, "_part", lambda *args: reads.append(1) or real(*args))
    corpus = write(tmp_path / "corpus", [[1, 2]])
    for vocab_size in (3, 4, 5):
        check_ids(corpus, vocab_size, tmp_path / "cache")
    assert len(reads) == 1
    (record,) = (tmp_path / "cache").glob("ids-*")
    record.write_text("damaged")
    check_ids(corpus, 3, tmp_path / "cache")
    assert len(reads) == 2
    numpy.array([1, 3], "int32").tofile(tmp_path / "corpus.bin")
    os.utime(tmp_path / "corpus.bin", ns=(1, 1))
    with pytest.raises(BadInput, match="holds the id 3"):
        check_ids(read_index(str(tmp_path / "corpus")), 3, tmp_path / "cache")
    assert len(reads) == 3


def test_a_prepared_corpus_tells_its_range_while_its_bin_is_the_one_it_was_written_about(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    prefix = tmp_path / "corpus"
    prepare_corpus([tmp_path / "a.txt"], prefix, workers=1)
    cache = tmp_path / "cache"
    check_ids(read_index(str(prefix)), 258, cache)
    assert not [*cache.glob("ids-*")]
    with pytest.raises(BadInput, match="holds the id 256"):
        check_ids(read_index(str(prefix)), 256, cache)
    numpy.array([97, 999, 98, 256], "uint16").tofile(f"{prefix}.bin")  # the .json is older now
    with pytest.raises(BadInput, match="holds the id 999"):
        check_ids(read_index(str(prefix)), 258, cache)
    sidecar = json.loads(prefix.with_suffix(".json").read_text())
    sidecar.pop("lowest_id")  # of an earlier version
    prefix.with_suffix(".json").write_text(json.dumps(sidecar))
    with pytest.raises(BadInput, match="holds the id 999"):
        check_ids(read_index(str(prefix)), 258, tmp_path / "elsewhere")


def test_unsigned_ids_that_all_fit_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(token_ids, "_part", None)
    check_ids(write(tmp_path / "corpus", [[65535]], "uint16"), 65536, tmp_path / "cache")


def test_a_mask_token_is_refused_by_file_and_document_and_remembered(tmp_path, monkeypatch):
    corpus = write(tmp_path / "corpus", [[1, 2], [3, 7, 7], [7]], "uint16")
    message = (
        r"corpus\.bin: document 1 \(counted from 0\) contains the mask token 7 at its token 1, as do 1 oth"
    )
    for _ in range(2):
        with pytest.raises(BadInput, match=message):
            check_ids(corpus, 65536, tmp_path / "cache", mask_token_id=7)
        monkeypatch.setattr(token_ids, "_part", None)
    monkeypatch.undo()
    check_ids(corpus, 65536, tmp_path / "cache", mask_token_id=5)


def test_a_prepared_corpus_is_not_read_for_the_mask_token_that_it_was_prepared_without(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("abc")
    prepare_corpus([tmp_path / "a.txt"], tmp_path / "corpus", workers=1)
    read = []
    real = token_ids._part
    monkeypatch.setattr(token_ids, "_part", lambda *args: read.append(1) or real(*args))
    index, cache = read_index(str(tmp_path / "corpus")), tmp_path / "cache"
    for mask, reads in ((257, 0), (96, 0), (98, 1)):  # its own, below all ids, and a letter
        try:
            check_ids(index, 300, cache, mask_token_id=mask)
        except BadInput:
            assert mask == 98
        assert len(read) == reads


def _verdict(prefix: str, cache: str) -> str:
    from pathlib import Path

    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    groups.initialize(LayoutConfig(processes=2))
    try:
        check_ids(read_index(prefix), 50, Path(cache))
    except BadInput as error:
        return str(error)
    finally:
        groups.destroy()
    return "good"


@pytest.mark.parametrize("value", [49, 50])
def test_every_rank_gets_the_same_verdict(tmp_path, value):
    write(tmp_path / "corpus", [[1, 2, 3], [value]])
    verdicts = run_ranks(_verdict, f"{tmp_path}/corpus", f"{tmp_path}/cache", processes=2)
    assert len(set(verdicts)) == 1
    assert verdicts[0].startswith("good" if value == 49 else f"{tmp_path}/corpus.bin: document 1 (counted")


def inspect(*arguments):
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args(["inspect", *map(str, arguments)]))


@pytest.mark.parametrize(
    ("options", "code", "last"),
    [
        ([], 0, "first tokens [0, 1, 2]"),
        (["--vocab-size", 3], 0, "first tokens [0, 1, 2]"),
        (
            ["--vocab-size", 2],
            1,
            "document 1 (counted from 0) holds the id 2 at its token 0; 1 ids in 1 documents",
        ),
    ],
)
def test_inspect_tells_the_range_and_what_is_outside_a_vocabulary(tmp_path, capsys, options, code, last):
    write(tmp_path / "corpus", [[0, 1], [2]])
    assert inspect(tmp_path / "corpus", *options) == code
    lines = capsys.readouterr().out.splitlines()
    assert "ids 0 to 2" in lines
    assert last in lines[-1]


def test_inspect_finds_negative_ids_without_any_vocabulary(tmp_path, capsys):
    write(tmp_path / "corpus", [[0, -1], [2]])
    assert inspect(tmp_path / "corpus") == 1
    assert "holds the id -1 at its token 1" in capsys.readouterr().out


def test_inspect_goes_on_without_the_tokenizer_that_prepared_it(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc")
    prepare_corpus([tmp_path / "a.txt"], tmp_path / "corpus", workers=1)
    path = tmp_path / "corpus.json"
    path.write_text(path.read_text().replace('"tokenizer": "bytes"', '"tokenizer": "gone.json"'))
    assert inspect(tmp_path / "corpus") == 0
    assert "first tokens [97, 98, 99, 256] (Tokenizer file gone.json does not" in capsys.readouterr().out
