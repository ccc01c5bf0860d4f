"""JSON of a user: a sentence with the file and what to do, whatever is in it."""

import json
from pathlib import Path

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import read_json, require, write_json


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "does not exist"),
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[1]", "holds no JSON object"),
    ],
)
def test_a_file_that_is_no_object_is_refused_with_its_name_and_the_remedy(tmp_path, content, problem):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadInput, match=rf"a\.json {problem}.*: give another\.$"):
        read_json(file, "give another")


def test_a_path_through_a_file_is_refused_too(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="does not exist"):
        read_json(tmp_path / "file" / "a.json", "give another")


def test_a_key_that_is_absent_is_named():
    require({"a": 1}, Path("a.json"), "a", remedy="give another")
    with pytest.raises(BadInput, match=r"a\.json has no 'b': give another\."):
        require({"a": 1}, Path("a.json"), "a", "b", remedy="give another")


def test_what_is_written_is_read_and_ends_its_last_line(tmp_path):
    file = tmp_path / "new" / "a.json"
    write_json(file, {"word": "größer", "numbers": [1, 2.5, None]})
    assert read_json(file, "") == {"word": "größer", "numbers": [1, 2.5, None]}
    assert file.read_text().endswith("}\n") and json.loads(file.read_text())
    write_json(None, {})
