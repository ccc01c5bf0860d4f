"""Properties of preparing a corpus, and of the text that CPython carries."""

import argparse
import json
import struct

import numpy
import pytest

from llada_megatron.commands.data import add_arguments, run
from llada_megatron.config.errors import BadInput
from llada_megatron.data import prepare
from llada_megatron.data.formats import json_lines
from llada_megatron.data.prepare import prepare_corpus, read_index, read_sidecar
from llada_megatron.data.python_text import MIN_DOCUMENT_BYTES, write_python_text

END = 256


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def documents_of(prefix):
    """The documents of a corpus, read with numpy alone."""
    index = read_index(str(prefix))
    tokens = numpy.fromfile(f"{prefix}.bin", index.dtype).tolist()
    starts = (index.document_offsets // index.dtype.itemsize).tolist()
    lengths = index.document_lengths.tolist()
    return [tokens[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def encode(tmp_path, texts, tokenizer="bytes"):
    """Encode a JSONL in this process: refusals need no pool."""
    path = write_jsonl(tmp_path / "in.jsonl", texts) if isinstance(texts, list) else tmp_path / "in.jsonl"
    if isinstance(texts, str):
        path.write_text(texts)
    chunk = prepare._Chunk(str(path), 0, path.stat().st_size)
    return prepare._encode_chunk(chunk, tokenizer, "text", numpy.uint16)


def test_every_document_is_kept_in_order_and_ended(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", ["one", "", "zwölf", "  \n "])
    (tmp_path / "b.txt").write_text("a whole\nfile")
    summary = prepare_corpus([lines, tmp_path / "b.txt"], tmp_path / "out" / "corpus", workers=1)
    texts = ["one", "zwölf", "a whole\nfile"]
    assert documents_of(tmp_path / "out" / "corpus") == [[*text.encode(), END] for text in texts]
    assert (summary["documents"], summary["empty_documents"]) == (3, 2)
    assert summary["bytes"] == sum(len(text.encode()) for text in texts) == summary["tokens"] - 3
    assert read_sidecar(str(tmp_path / "out" / "corpus")) == summary
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corpus.bin",
        "corpus.idx",
        "corpus.json",
    ]


def test_the_files_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 1000)
    texts = [f"document {number} " * (number % 17 + 1) for number in range(300)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in (1, 2):
        prepare_corpus([lines], tmp_path / str(workers), workers=workers)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    assert documents_of(tmp_path / "2") == [[*text.encode(), END] for text in texts]


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_chunks_of_any_size_hold_every_line_once(tmp_path, step, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", step)
    texts = ["x" * length for length in range(1, 40)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text().rstrip("\n"))
    chunks = prepare._chunks([path], set())
    ranges = [(chunk.path, chunk.start, chunk.stop) for chunk in chunks]
    assert [text for each in ranges for _, text in json_lines(*each, "text")] == texts


def test_a_file_longer_than_a_chunk_is_still_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK_BYTES", 5)
    (tmp_path / "a.txt").write_text("longer than a chunk")
    prepare_corpus([tmp_path / "a.txt"], tmp_path / "corpus", workers=1)
    assert documents_of(tmp_path / "corpus") == [[*b"longer than a chunk", END]]


def test_a_document_with_the_mask_token_is_refused_by_file_and_number(tmp_path):
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["</s>", "[MASK]"])
    tokenizer.save(str(tmp_path / "t.json"))
    assert encode(tmp_path, ["a", "a"], str(tmp_path / "t.json")).tokens.tolist() == [1, 2, 1, 2]
    with pytest.raises(BadInput, match=r"in\.jsonl, document 3 \(line 3\) contains the mask token \(id 3\)"):
        encode(tmp_path, ["a", "", "a[MASK]a"], str(tmp_path / "t.json"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": \n', r"in\.jsonl, document 2 \(line 2\) is not JSON"),
        ('{"body": "a"}\n', r"document 1 \(line 1\) has no field 'text': set --text-field"),
        ('\n["a"]\n', r"document 2 \(line 2\) has no field 'text'"),
        ('{"text": 3}\n', r"the field 'text' is not a string"),
    ],
)
def test_bad_lines_are_refused_by_file_and_line(tmp_path, content, message):
    with pytest.raises(BadInput, match=message):
        encode(tmp_path, content)


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    assert encode(tmp_path, ["a\ud800"]).tokens.tolist() == [*b"a?", END]


def test_a_failure_leaves_the_old_corpus_and_nothing_else(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", ["good"])
    prepare_corpus([lines], tmp_path / "corpus", workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != lines}
    lines.write_text("not json\n")
    with pytest.raises(BadInput, match="is not JSON"):
        prepare_corpus([lines], tmp_path / "corpus", workers=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != lines} == before


def test_unusable_inputs_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write_jsonl(tmp_path / "own.json", ["a"])
    for inputs, message in [
        ([], "No input file is named"),
        ([tmp_path / "absent.txt"], "absent.txt is not a file"),
        ([tmp_path / "empty.jsonl"], "holds no text"),
        ([tmp_path / "latin.txt"], "is not UTF-8 at byte 3"),
        ([tmp_path / "own.json"], "would be overwritten"),
    ]:
        with pytest.raises(BadInput, match=message):
            prepare_corpus(inputs, tmp_path / "own", workers=1)
    assert not list(tmp_path.glob("own*.partial*"))


def test_damaged_corpora_are_refused_by_path(tmp_path):
    prefix = tmp_path / "corpus"
    prepare_corpus([write_jsonl(tmp_path / "a.jsonl", ["abc", "defg"])], prefix, workers=1)
    whole = {suffix: (tmp_path / f"corpus.{suffix}").read_bytes() for suffix in ("bin", "idx")}
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, 0, 1) + bytes(8)
    for suffix, content, message in [
        ("bin", whole["bin"][:-1], r"corpus\.bin is truncated: its index needs 18 bytes, it has 17"),
        ("bin", b"", r"corpus\.bin is truncated"),
        ("idx", whole["idx"][:20], r"corpus\.idx is truncated: it is shorter than its header"),
        ("idx", whole["idx"][:-1], r"corpus\.idx is truncated: 2 documents need"),
        ("idx", b"X" + whole["idx"][1:], r"corpus\.idx is not an index"),
        ("idx", header, r"corpus\.idx holds no documents"),
    ]:
        (tmp_path / f"corpus.{suffix}").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            read_index(str(prefix))
        (tmp_path / f"corpus.{suffix}").write_bytes(whole[suffix])
    assert read_index(str(prefix)).tokens == 9
    (tmp_path / "corpus.idx").unlink()
    with pytest.raises(BadInput, match=r"corpus\.idx does not exist"):
        read_index(str(prefix))


def test_a_json_of_someone_else_is_no_sidecar(tmp_path):
    (tmp_path / "corpus.json").write_text('{"text": "a"}\n' * 10_000)
    assert read_sidecar(str(tmp_path / "corpus")) is None


def test_inspect_shows_counts_and_the_first_text(tmp_path, capsys):
    prepare_corpus([write_jsonl(tmp_path / "a.jsonl", ["hällo", "wörld!"])], tmp_path / "corpus", workers=1)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["inspect", str(tmp_path / "corpus")])) == 0
    assert capsys.readouterr().out.splitlines() == [
        "documents 2",
        "tokens 15",
        "mean length 7.5 tokens",
        "as a log-normal: llada plan --document-tokens 7,0.07",
        "hällowörld!",
    ]


def test_python_text_is_large_and_has_no_short_document_and_one_order(tmp_path):
    count = write_python_text(tmp_path / "a.jsonl")
    write_python_text(tmp_path / "b.jsonl")
    records = [json.loads(line) for line in (tmp_path / "a.jsonl").open()]
    lengths = [len(record["text"].encode()) for record in records]
    assert count == len(records) == len({record["source"] for record in records})
    assert sum(lengths) > 2_000_000
    assert min(lengths) >= MIN_DOCUMENT_BYTES
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    last = records[-len(records) // 5 :]
    assert len({record["source"].startswith("pydoc_data.topics/") for record in last}) == 2
    assert not any("test" in record["source"].split("/")[:-1] for record in records)
