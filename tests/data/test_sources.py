"""What inputs name, and what each file is: its content decides, whatever it is called."""

import bz2
import gzip
import json
import lzma
import os
import sys
from itertools import count

import pyarrow
import pyarrow.parquet
import pytest
from backports import zstd

from llada_megatron.config.errors import BadInput
from llada_megatron.data import containers
from llada_megatron.data.containers import CONTAINERS
from llada_megatron.data.sources import find_sources

LINES = b'{"text": "one"}\r\n\r\n{"text": "two"}\n'
PACKED = {"": bytes, "gzip": gzip.compress, "zstd": zstd.compress, "xz": lzma.compress, "bzip2": bz2.compress}


def read(path, container=None):
    """(what a file was taken for, its records)"""
    (source,), _ = find_sources([path], [], container)
    parse = CONTAINERS[source.container].parse
    with open(path, "rb") as file:
        return source.kind, [parse(record) for record in source.records(file) if record]


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a.JSONL", "part-00000", "a.txt", "a.gz"])
def test_lines_of_json_are_that_under_any_name_and_packing(tmp_path, packing, name):
    path = tmp_path / name
    path.write_bytes(PACKED[packing](LINES))
    kind = "JSON lines" + (f", {packing}" if packing else "")
    assert read(path) == (kind, [{"text": "one"}, {"text": "two"}])


@pytest.mark.parametrize(
    ("content", "kind", "records"),
    [
        (b"a {b}\n", "text", ["a {b}\n"]),
        (b"a\r\nb", "text", ["a\r\nb"]),
        (b"{{Infobox}} a", "text", ["{{Infobox}} a"]),
        (b"[Chorus] a", "text", ["[Chorus] a"]),
        (b"", "empty", []),
        (b"\xef\xbb\xbf", "empty", []),
        (b"\xef\xbb\xbfa\xef\xbb\xbf", "text", ["a\ufeff"]),
        (b"\xef\xbb\xbf" + LINES, "JSON lines", [{"text": "one"}, {"text": "two"}]),
        (b" \n" + LINES, "JSON lines", [{"text": "one"}, {"text": "two"}]),
        (b'[{"text": "one"},\n {"text": "two"}]', "JSON", [{"text": "one"}, {"text": "two"}]),
        (b'{\n "text": "one"\n}\n', "JSON", [{"text": "one"}]),
        (b"[]", "JSON", []),
        (b"{}\n{}\n", "JSON lines", [{}, {}]),
    ],
)
def test_the_kind_is_read_from_the_content(tmp_path, content, kind, records):
    (tmp_path / "a").write_bytes(content)
    assert read(tmp_path / "a") == (kind, records)


def test_the_container_may_be_forced(tmp_path):
    (tmp_path / "a.json").write_bytes(LINES)
    assert read(tmp_path / "a.json", "text") == ("text", [LINES.decode()])


def test_rows_of_parquet_are_records_and_what_json_does_not_know_is_null(tmp_path):
    rows = [{"text": f"row {number}", "raw": b"\xff", "list": [{"a": number}]} for number in range(1000)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "a.txt", row_group_size=300, compression="zstd")
    kind, found = read(tmp_path / "a.txt")
    assert kind == "parquet"
    assert found == [row | {"raw": None} for row in rows]


def test_strings_of_parquet_that_are_not_utf8_are_a_sentence(tmp_path):
    texts = pyarrow.array([b"caf\xe9"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a")
    with pytest.raises(BadInput, match=r"a is cut off or damaged \(parquet"):
        read(tmp_path / "a")


def test_parquet_without_pyarrow_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(BadInput, match="needs pyarrow: pip install"):
        read(tmp_path / "a")


TAR = bytes(257) + b"ustar" + bytes(250)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "größer".encode("utf-16"), "is UTF-16: convert it"),
        ("a.txt", "\ufeffa".encode("utf-16-be"), "is UTF-16: convert it"),
        ("a.txt", "plain".encode("utf-16-le"), "holds NUL bytes: it is binary, or UTF-16"),
        ("a.txt", b"a" * 70_000 + b"\0", "BadRecord.*holds a NUL at character 70000"),
        ("a.txt", b"caf\xe9", "BadRecord.*is not UTF-8 at byte 3"),
        ("a.txt", b"\x28\xb5\x2f\xfdnonsense", r"is cut off or damaged \(zstd"),
        ("a.txt", gzip.compress(gzip.compress(LINES)), "is compressed twice"),
        ("a.zip", b"PK\x03\x04rest", "is a zip archive"),
        ("a.tgz", gzip.compress(TAR), "is a tar archive"),
        ("a.parquet", gzip.compress(b"PAR1" + bytes(20)), "is a parquet file in gzip"),
        ("a.parquet", b"PAR1" + bytes(20), r"is cut off or damaged \(parquet"),
        ("a.json", b"no json", "is called JSON and does not begin like it: set --container"),
        ("a.jsonl.gz", gzip.compress(b"no json"), "is called JSON and does not begin like it"),
        ("a", b'[{"text": "a"},', "is not one JSON value"),
        ("a", b'{\n"text": "a"}\n{\n"text": "b"}', "is not one JSON value.*jq -c"),
        ("a", b'[{"text": ' + b"[" * 100_000, "is not one JSON value"),
        ("a", b'[{"text": "a", "text": "b"}]', "the key 'text' comes twice"),
        ("a", b'[{"text": "\xff"}]', "is not one JSON value"),
    ],
    ids=count(),  # packed bytes hold the time, and every worker must collect the same names
)
def test_what_is_no_text_is_one_sentence(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((BadInput, containers.BadRecord)) as refused:
        read(tmp_path / name)
    assert refused.match(message.removeprefix("BadRecord.*"))


@pytest.mark.parametrize("packing", [*PACKED][1:])
def test_a_packed_file_that_is_cut_off_or_damaged_is_refused_by_name(tmp_path, packing):
    text = b"".join(b'{"text": "%d"}\n' % (number**5) for number in range(20_000))
    content = PACKED[packing](text)
    for cut in (content[:-9], content[: len(content) // 2]):
        (tmp_path / "a").write_bytes(cut)
        with pytest.raises(BadInput, match=rf"a is cut off or damaged \({packing}"):
            read(tmp_path / "a")
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 0xFF
    (tmp_path / "a").write_bytes(damaged)
    with pytest.raises((BadInput, containers.BadRecord)):  # a record may go wrong before the checksum does
        read(tmp_path / "a")


def test_records_beyond_a_gib_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MAX_RECORD_BYTES", 20)
    for content, message in [
        (LINES + b'{"text": "longer than that"}\n', "a, line 4 is longer than 1 GiB"),
        (b"a" * 21, "a is larger than 1 GiB"),
        (b'{\n"text": "longer than that"}', "a is larger than 1 GiB"),
    ]:
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(BadInput, match=message):
            read(tmp_path / "a")


def test_folders_and_patterns_are_their_files_in_order(tmp_path):
    for name in ["b/2", "b/10", "a.txt", "c/d/e", "_SUCCESS", ".crc", "c/_temporary/f"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "linked").symlink_to(tmp_path / "b")
    sources, left_out = find_sources([tmp_path], [])
    assert [os.path.relpath(source.path, tmp_path) for source in sources] == ["a.txt", "b/10", "b/2", "c/d/e"]
    assert sorted(os.path.relpath(path, tmp_path) for path in left_out) == [
        ".crc",
        "_SUCCESS",
        "c/_temporary",
        "linked",
    ]
    sources, _ = find_sources([f"{tmp_path}/**/[a-d]*", tmp_path / "c"], [])
    assert [os.path.relpath(source.path, tmp_path) for source in sources] == ["a.txt", "c/d/e"]


def test_a_file_named_like_a_pattern_is_itself(tmp_path):
    (tmp_path / "a[1].txt").write_text("a")
    (tmp_path / "a1.txt").write_text("b")
    (source,), _ = find_sources([tmp_path / "a[1].txt"], [])
    assert source.path.endswith("a[1].txt")


@pytest.mark.parametrize("second", ["a.txt", "./a.txt", "link", "hard", ".", "*.txt"])
def test_the_same_file_twice_is_refused_under_any_name(tmp_path, monkeypatch, second):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    if second == "link":
        (tmp_path / "link").symlink_to("a.txt")
    elif second == "hard":
        (tmp_path / "hard").hardlink_to(tmp_path / "a.txt")
    with pytest.raises(BadInput, match=r"is the same file as a\.txt: name it once"):
        find_sources(["a.txt", second], [])


def test_inputs_that_are_not_there_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in [
        ("absent.txt", "absent.txt is not a file, a folder or a pattern"),
        ("*.txt", r"\*.txt matches no file"),
        ("empty", "empty is a folder without files"),
    ]:
        with pytest.raises(BadInput, match=message):
            find_sources([tmp_path / name], [])


def test_a_record_is_named_by_what_people_can_count(tmp_path):
    (tmp_path / "a").write_bytes(LINES)
    places = {}
    for container in ("lines", "json", "parquet", "text"):
        (source,), _ = find_sources([tmp_path / "a"], [], container)
        places[container] = source.place(3).removeprefix(str(tmp_path))
    assert places == {"lines": "/a, line 3", "json": "/a, record 3", "parquet": "/a, row 3", "text": "/a"}


def test_a_compressed_file_is_read_as_a_stream(tmp_path):
    """64 MiB in 64 KiB: what is held at a time is a line."""
    import tracemalloc

    line = json.dumps({"text": "a" * 10_000}).encode() + b"\n"
    with gzip.open(tmp_path / "a.gz", "wb", compresslevel=1) as file:
        for _ in range(6400):
            file.write(line)
    (source,), _ = find_sources([tmp_path / "a.gz"], [])
    tracemalloc.start()
    with open(tmp_path / "a.gz", "rb") as file:
        count = sum(1 for _ in source.records(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 6400
    assert peak < 2**20
