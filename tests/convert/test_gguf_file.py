"""The header of a GGUF file: right values, or a sentence for whatever bytes, at once."""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llada_megatron.config.errors import BadInput
from llada_megatron.convert.gguf_file import GgufFile
from tests import packages


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


KEYS = [
    key("general.architecture", 8, text("llama")),
    key("a", 4, struct.pack("<I", 7)),
    key("b", 6, struct.pack("<f", 0.5)),
    key("c", 7, b"\x01"),
    key("texts", 9, struct.pack("<IQ", 8, 2) + text("x") + text("Ġ")),
    key("numbers", 9, struct.pack("<IQ3i", 5, 3, 1, -2, 3)),
    key("none", 9, struct.pack("<IQ", 5, 0)),
]


def gguf(*keys: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, data: bytes = b"") -> bytes:
    head = (
        b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    )
    return head + bytes(-len(head) % 32) + data


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_every_kind_of_value_is_read(tmp_path: Path) -> None:
    found = GgufFile(write(tmp_path / "f", gguf(*KEYS))).fields
    assert found == {
        "general.architecture": "llama",
        "a": 7,
        "b": 0.5,
        "c": True,
        "texts": ["x", "Ġ"],
        "numbers": [1, -2, 3],
        "none": [],
    }


BAD = [
    (b"", "it is too short"),
    (b"GGML" + bytes(40), "it does not begin with GGUF"),
    (gguf(version=1), "its version is 1, and 2 and 3 are served"),
    (gguf(*KEYS)[:-40], "it ends at byte"),
    (gguf(KEYS[1], KEYS[1]), "'a' comes twice"),
    (gguf(key("a", 13, b"")), "'a' is of type 13, which is none"),
    (gguf(key("a\nb" + "c" * 2000, 13, b"")), f"'a\\nb{'c' * 75} is of type 13"),
    (gguf(key("a", 9, struct.pack("<IQ", 9, 1) + bytes(40))), "an array of type 9, which is not served"),
    (gguf(key("a", 9, struct.pack("<IQ", 8, 1 << 60))), "states 1,152,921,504,606,846,976 texts"),
    (gguf(key("a", 9, struct.pack("<IQ", 4, 1 << 60))), "it ends at byte"),
    (gguf(struct.pack("<Q", 1 << 63)), "it ends at byte"),
    (gguf(key("a", 8, struct.pack("<Q", 1) + b"\xff")), "is not UTF-8"),
    (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(40), "comes twice"),
    (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(40), "has 0 dimensions"),
]


@pytest.mark.parametrize("content, sentence", BAD, ids=[sentence[:30] for _, sentence in BAD])
def test_a_damaged_file_is_a_sentence(content: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput) as refused:
        GgufFile(write(tmp_path / "f", content))
    assert sentence in str(refused.value)


def tensor(name: str, kind: int, offset: int, *sizes: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


@pytest.mark.slow  # whose environment has the package
def test_tensors_lie_one_after_another(tmp_path: Path) -> None:
    packages.gguf()
    good = (tensor("w", 0, 0, 3, 2), tensor("v", 8, 32, 32))  # F32 [2, 3], Q8_0 [32]
    data = struct.pack("<6f", *range(6)) + bytes(8) + bytes(34)
    found = GgufFile(write(tmp_path / "f", gguf(tensors=good, data=data))).tensors
    assert {name: (each.shape, each.kind.name) for name, each in found.items()} == {
        "w": ((2, 3), "F32"),
        "v": ((32,), "Q8_0"),
    }
    assert found["w"].data.tobytes() == data[:24]
    for tensors, sentence in (
        ((tensor("w", 999, 0, 3),), "'w' is of type 999, which is not known"),
        ((tensor("w", 0, 32, 3),), "'w' of shape .3. at 32 does not fit what is before it"),
        ((tensor("w", 8, 0, 3),), "'w' of shape .3. at 0 does not fit what is before it"),
        ((tensor("w", 0, 0, 3, 0),), "'w' of shape .0, 3. at 0 does not fit what is before it"),
        ((good[0], tensor("w", 0, 32, 3)), "'w' of shape .3. at 32 does not fit what is before it"),
        ((tensor("w", 0, 0, 1 << 40, 1 << 40),), "it ends inside 'w'"),
    ):
        with pytest.raises(BadInput, match=sentence):
            GgufFile(write(tmp_path / "bad", gguf(tensors=tensors, data=data)))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 300), put=st.binary(min_size=1, max_size=9), cut=st.integers(0, 40))
def test_altered_bytes_are_a_sentence_or_a_file(at: int, put: bytes, cut: int, tmp_path: Path) -> None:
    content = gguf(*KEYS)
    content = content[:at] + put + content[at + len(put) :]
    try:
        GgufFile(write(tmp_path / "f", content[: len(content) - cut]))
    except BadInput as refused:
        assert str(refused).count("\n") == 0
