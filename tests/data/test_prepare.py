"""Properties of preparing a corpus, and of the text that CPython carries."""

import argparse
import dataclasses
import json
import os
import struct

import numpy
import pytest
import tokenizers

from llada_megatron.commands.data import add_arguments, run
from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.data import prepare
from llada_megatron.data.corpus import read_index, read_sidecar
from llada_megatron.data.documents import Preparation
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.data.python_text import MIN_DOCUMENT_BYTES, write_python_text
from llada_megatron.data.sources import find_sources

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


def encode(tmp_path, texts, **how):
    """Encode a JSONL in this process: refusals need no pool."""
    path = write_jsonl(tmp_path / "in.jsonl", texts) if isinstance(texts, list) else tmp_path / "in.jsonl"
    if isinstance(texts, str):
        path.write_text(texts)
    (block,) = prepare._blocks(find_sources([path], [])[0])
    return prepare._encode(block, Preparation(**how), numpy.uint16)


@pytest.fixture
def words(tmp_path):
    """A tokenizer.json of the words [UNK] 0, a 1, b 2, </s> 3 and [MASK] 4."""
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["</s>", "[MASK]"])
    tokenizer.save(str(tmp_path / "t.json"))
    return str(tmp_path / "t.json")


def llada_data(*arguments):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(argument) for argument in arguments]))


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
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 1000)
    texts = [f"document {number} " * (number % 17 + 1) for number in range(300)]
    lines = write_jsonl(tmp_path / "a.jsonl", texts)
    for workers in (1, 2):
        prepare_corpus([lines], tmp_path / str(workers), workers=workers)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"1.{suffix}").read_bytes() == (tmp_path / f"2.{suffix}").read_bytes()
    assert documents_of(tmp_path / "2") == [[*text.encode(), END] for text in texts]


@pytest.mark.parametrize("step", [1, 7, 64, 10_000])
def test_blocks_of_any_size_hold_every_line_once_under_its_number(tmp_path, step, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", step)
    texts = ["x" * length for length in range(1, 40)]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    path.write_text(path.read_text().rstrip("\n"))
    blocks = [*prepare._blocks(find_sources([path], [])[0])]
    assert [json.loads(record)["text"] for block in blocks for record in block.records] == texts
    for block in blocks:
        assert json.loads(block.records[0])["text"] == texts[block.first - 1]


def test_a_document_with_the_mask_token_is_refused_by_file_and_line(tmp_path, words):
    how = dict(tokenizer=words, parse_special=True)
    assert encode(tmp_path, ["a", "a"], **how).tokens.tolist() == [1, 3, 1, 3]
    with pytest.raises(BadInput, match=r"in\.jsonl, line 3 contains the mask token \(id 4\).*drop or split"):
        encode(tmp_path, ["a", "", "a [MASK] a"], **how, mask_token_in_text="refuse")


@pytest.mark.parametrize(
    ("rule", "tokens", "documents"),
    [("drop", [1, 3, 2, 3], 2), ("split", [1, 3, 1, 3, 2, 1, 3, 2, 3], 4)],
)
def test_the_mask_token_in_a_text_drops_or_splits_its_document(tmp_path, words, rule, tokens, documents):
    texts = ["a", "[MASK] a [MASK] [MASK] b a", "[MASK]", "b"]
    asked = {} if rule == "drop" else {"mask_token_in_text": rule}  # it is what happens unasked
    found = encode(tmp_path, texts, tokenizer=words, parse_special=True, **asked)
    assert (found.tokens.tolist(), len(found.lengths)) == (tokens, documents)
    assert found.counts["documents_with_mask_token"] == 2
    assert found.counts["documents"] == documents
    # What was left out is in no count of what was kept; the text of a split document is.
    assert found.counts["bytes"] == {"drop": 2, "split": 2 + len(texts[1])}[rule]


def test_names_of_special_tokens_are_text_unless_asked_and_counted_either_way(tmp_path, words):
    text = "a </s> b"
    plain = encode(tmp_path, [text], tokenizer=words)
    parsed = encode(tmp_path, [text], tokenizer=words, parse_special=True)
    assert plain.tokens.tolist() == [1, 0, 2, 3]  # an unknown word like any other
    assert parsed.tokens.tolist() == [1, 3, 2, 3]
    assert plain.counts["special_strings"] == parsed.counts["special_strings"] == 1
    assert (plain.counts["unknown_tokens"], parsed.counts["unknown_tokens"]) == (1, 0)


DEEP = '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
BAD_LINES = [
    ('{"text": "a"}\n{"text": \n', r"in\.jsonl, line 2 is not JSON"),
    ('{"body": "a", "id": 1}\n', r"line 1 has no field 'text' \(its fields: body, id\): set --text-field"),
    ('{"text": "a"}\n\n["a"]\n', r"line 3 is not a JSON object"),
    ('{"text": 3}\n', r"line 1 holds no text in the field 'text', but a number"),
    ('{"text": null}\n', r"line 1 holds no text in the field 'text', but null"),
    ('{"text": "a", "text": "b"}\n', r"line 1 is not JSON: the key 'text' comes twice"),
    ('{"text": "a\x01"}\n', r"line 1 is not JSON"),
    (DEEP, r"line 1 is nested too deep for JSON"),
    ('{"text": ' + "9" * 5000 + "}\n", r"line 1 is not JSON"),
]


@pytest.mark.parametrize(("content", "message"), BAD_LINES, ids=[message for _, message in BAD_LINES])
def test_a_bad_line_is_refused_by_file_and_line_and_left_out_where_it_may_be(tmp_path, content, message):
    (sentence,) = encode(tmp_path, content).bad
    with pytest.raises(BadInput, match=message):
        prepare._allow([sentence], 1, 0, print)
    good = encode(tmp_path, content + '{"text": "good"}\n', skip_bad=1)
    assert good.tokens.tolist()[-5:] == [*b"good", END]
    assert good.bad == [sentence]


def test_a_line_that_is_not_utf8_is_bad(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert encode(tmp_path, None).bad == [f"{tmp_path / 'in.jsonl'}, line 1 is not UTF-8 at its byte 13"]


def test_bad_records_up_to_a_number_are_left_out_alike_by_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK_BYTES", 60)
    lines = [json.dumps({"text": f"good {number}"}) for number in range(40)]
    for bad in (3, 4, 20, 38):
        lines[bad] = f"bad {bad}"
    (tmp_path / "a.jsonl").write_text("{" + "\n".join(lines)[1:])
    how, said = Preparation(skip_bad=4), {}
    for workers in (1, 2):
        said[workers] = []
        output = tmp_path / str(workers)
        summary = prepare_corpus(
            [tmp_path / "a.jsonl"], output, how, workers=workers, say=said[workers].append
        )
        assert (summary["documents"], summary["bad_records"]) == (36, 4)
        allowed, line = {1: (0, 4), 2: (3, 39)}[workers]
        fewer = dataclasses.replace(how, skip_bad=allowed)
        with pytest.raises(BadInput, match=rf"line {line} is not JSON.*number {allowed + 1} and"):
            prepare_corpus([tmp_path / "a.jsonl"], tmp_path / "other", fewer, workers=workers)
    assert (tmp_path / "1.bin").read_bytes() == (tmp_path / "2.bin").read_bytes()
    assert said[1] == said[2]
    assert [line.split(" is ")[0] for line in said[1][1:]] == [
        f"left out: {tmp_path}/a.jsonl, line {number}" for number in (4, 5, 21, 39)
    ]
    assert not list(tmp_path.glob("other*"))


def test_half_a_surrogate_pair_is_replaced_and_counted(tmp_path):
    found = encode(tmp_path, ["a\ud800", "b"])
    assert found.tokens.tolist() == [*b"a?", END, *b"b", END]
    assert found.counts["documents_with_replaced_characters"] == 1


def test_a_failure_leaves_the_old_corpus_and_nothing_else(tmp_path):
    lines = write_jsonl(tmp_path / "a.jsonl", ["good"])
    prepare_corpus([lines], tmp_path / "corpus", workers=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != lines}
    lines.write_text('{"text": "good"}\nnot json\n')
    with pytest.raises(BadInput, match="is not JSON"):
        prepare_corpus([lines], tmp_path / "corpus", workers=1, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != lines} == before


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_a_corpus_that_is_there_is_replaced_only_when_asked(tmp_path, suffix):
    lines = write_jsonl(tmp_path / "a.jsonl", ["new"])
    (tmp_path / f"corpus.{suffix}").write_text("old")
    command = ["prepare", "--input", lines, "--output", tmp_path / "corpus", "--workers", 1]
    with pytest.raises(BadInput, match=rf"corpus\.{suffix} exists already: .*--overwrite"):
        llada_data(*command)
    assert (tmp_path / f"corpus.{suffix}").read_text() == "old"
    assert llada_data(*command, "--overwrite") == 0
    assert documents_of(tmp_path / "corpus") == [[*b"new", END]]


@pytest.mark.parametrize("output", ["", ".", "..", "folder/", "folder/.."])
def test_an_output_without_a_name_is_refused(tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    lines = write_jsonl(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(BadInput, match=r"--output '.*' names no corpus"):
        llada_data("prepare", "--input", lines, "--output", output)
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_python_text_replaces_nothing_unasked(tmp_path):
    (tmp_path / "text.jsonl").write_text("mine")
    with pytest.raises(BadInput, match=r"text\.jsonl exists already"):
        llada_data("python-text", "--output", tmp_path)
    assert (tmp_path / "text.jsonl").read_text() == "mine"


def test_the_end_of_a_document_is_named_where_it_is_not_known(tmp_path):
    vocabulary = {"[UNK]": 0, "a": 1, "<end>": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "t.json"))
    lines = write_jsonl(tmp_path / "a.jsonl", ["a"])
    command = ["prepare", "--input", lines, "--output", tmp_path / "corpus", "--workers", 1]
    command += ["--tokenizer", tmp_path / "t.json"]
    with pytest.raises(BadInput, match=r"t\.json names no end-of-document token.*--end-of-document TOKEN"):
        llada_data(*command)
    with pytest.raises(BadInput, match=r"t\.json has no token '<stop>': choose another --end-of-document"):
        llada_data(*command, "--end-of-document", "<stop>")
    assert llada_data(*command, "--end-of-document", "<end>") == 0
    sidecar = read_sidecar(str(tmp_path / "corpus"))
    assert (sidecar["end_of_document"], sidecar["end_of_document_id"]) == ("<end>", 2)
    assert documents_of(tmp_path / "corpus") == [[1, 2]]


def test_what_was_taken_for_what_and_what_was_switched_off_is_said(tmp_path, words, capsys):
    tokenizer = tokenizers.Tokenizer.from_file(words)
    tokenizer.enable_truncation(1)
    tokenizer.save(words)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "part-00000", ["a b a </s>"])
    (tmp_path / "in" / "b.txt").write_text("\ufeffb")
    (tmp_path / "in" / "_SUCCESS").write_text("")
    arguments = ["--input", tmp_path / "in", "--output", tmp_path / "corpus", "--tokenizer", words]
    assert llada_data("prepare", *arguments, "--workers", 1) == 0
    assert documents_of(tmp_path / "corpus") == [[2, 3], [1, 2, 1, 0, 3]]
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/in/b.txt: text, its byte order mark left out",
        f"{tmp_path}/in/part-00000: JSON lines",
        f"{tmp_path}/in/_SUCCESS: left out",
        f"{words}: its truncation at 1 tokens is switched off",
        f"{tmp_path}/corpus: 2 documents, 7 tokens, 11 bytes of text; 0 empty documents skipped; "
        "each document ends with </s>",
        "1 names of special tokens in the text stayed text",
        "1 tokens stand for text that the vocabulary does not hold",
    ]
    sidecar = read_sidecar(str(tmp_path / "corpus"))
    assert sidecar["inputs"] == {"text": 1, "JSON lines": 1}
    assert sidecar["tokenizer_notes"] == ["its truncation at 1 tokens is switched off"]
    assert (sidecar["parse_special"], sidecar["lowest_id"], sidecar["highest_id"]) == (False, 0, 3)


def test_unusable_inputs_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    write_jsonl(tmp_path / "own.json", ["a"])
    for inputs, message in [
        ([], "No input file is named"),
        ([tmp_path / "empty.jsonl"], "holds no text"),
        ([tmp_path / "latin.txt"], "is not UTF-8 at byte 3"),
        ([tmp_path / "own.json"], "would be overwritten"),
        ([tmp_path], "own.json would be overwritten"),
    ]:
        with pytest.raises(BadInput, match=message):
            prepare_corpus(inputs, tmp_path / "own", workers=1, overwrite=True)
    assert not list(tmp_path.glob("own*.partial*"))


def test_a_worker_that_was_killed_is_no_traceback():
    with pytest.raises(RunFailed, match="fewer --workers"):
        list(prepare._in_order(iter([1]), os._exit, 1))


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
        ("idx", whole["idx"][:34] + b"\xff" * 4 + whole["idx"][38:], r"corpus\.idx is damaged"),
        ("idx", whole["idx"][:42] + b"\x01" + whole["idx"][43:], r"corpus\.idx is damaged"),
        ("idx", whole["idx"][:42] + b"\xff" * 8 + whole["idx"][50:], r"corpus\.idx is damaged"),
        ("idx", whole["idx"][:44] + b"\x01" + whole["idx"][45:], r"corpus\.bin is truncated"),
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


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b'"tokens": 2', b'"tokens": "2"'),
        lambda content: content.replace(b'"tokenizer":', b'"tokeniser":'),
        lambda content: b"[" * 60_000 + content,
    ],
)
def test_a_damaged_sidecar_is_refused_by_name(tmp_path, change):
    prepare_corpus([write_jsonl(tmp_path / "a.jsonl", ["a"])], tmp_path / "corpus", workers=1)
    path = tmp_path / "corpus.json"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadInput, match=r"corpus\.json, which tells the corpus's tokenizer, is damaged"):
        read_sidecar(str(tmp_path / "corpus"))


def test_inspect_shows_counts_and_the_first_text(tmp_path, capsys):
    prepare_corpus([write_jsonl(tmp_path / "a.jsonl", ["hällo", "wörld!"])], tmp_path / "corpus", workers=1)
    assert llada_data("inspect", tmp_path / "corpus") == 0
    assert capsys.readouterr().out.splitlines() == [
        "documents 2",
        "tokens 15",
        "mean length 7.5 tokens",
        "as a log-normal: llada plan --document-tokens 7,0.07",
        "ids 33 to 256",
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
