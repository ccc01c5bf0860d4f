"""Which files a folder's tensors are read from: one way to understand it, or a sentence that says why not."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.config.errors import BadInput
from llada_megatron.convert.safetensors_files import SafetensorsReader
from llada_megatron.convert.weight_files import INDEX, SINGLE

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WEIGHT_MAP = {"a": FIRST, "b": SECOND}
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}


def write_index(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": TENSORS["a"]}, tmp_path / FIRST)
    save_file({"b": TENSORS["b"]}, tmp_path / SECOND)
    write_index(tmp_path, {"metadata": {}, "weight_map": WEIGHT_MAP})
    return tmp_path


def test_shards_by_their_index_and_what_lies_beside_them_is_named(sharded: Path) -> None:
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "x.gguf"):
        (sharded / name).write_bytes(b"")
    reader = SafetensorsReader(sharded)
    assert reader.shapes() == {"a": (2, 3), "b": (4,)}
    assert reader.unread == [
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "pytorch_model.bin",
        "x.gguf",
    ]


def test_an_index_that_names_the_single_file_is_no_contradiction(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE)
    write_index(tmp_path, {"weight_map": {"a": SINGLE, "b": SINGLE}})
    assert SafetensorsReader(tmp_path).shapes().keys() == TENSORS.keys()


def single_beside_the_index(folder: Path) -> None:
    save_file({name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}, folder / SINGLE)


def single_beside_shards_without_index(folder: Path) -> None:
    single_beside_the_index(folder)
    (folder / INDEX).unlink()


def only(*names: str) -> Callable[[Path], None]:
    def remain(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name in names:
            (folder / name).write_bytes(b"")

    return remain


def indexed(content: object) -> Callable[[Path], None]:
    return lambda folder: write_index(folder, content)


def placed(**files: str) -> Callable[[Path], None]:
    return indexed({"weight_map": WEIGHT_MAP | files})


def twice(folder: Path) -> None:
    save_file(TENSORS, folder / SECOND)


BAD = [
    (single_beside_the_index, f"{SINGLE} and, by {INDEX}, {FIRST}: readers differ"),
    (
        single_beside_shards_without_index,
        f"{FIRST} without {INDEX}: copy the index too, or remove the shards",
    ),
    (lambda folder: (folder / INDEX).unlink(), f"{FIRST} without {INDEX}: copy the index too."),
    (lambda folder: (folder / SECOND).unlink(), f"holds no {SECOND}"),
    (indexed("{"), "is not JSON"),
    (indexed("[" * 100_000), "is not JSON"),
    (indexed("[1]"), "holds no JSON object"),
    (indexed({"metadata": {}}), "has no 'weight_map'"),
    (indexed({"weight_map": ["a"]}), "has a 'weight_map' that names no file"),
    (indexed({"weight_map": {}}), "has a 'weight_map' that names no file"),
    (indexed('{"weight_map": {"a": "x", "a": "y"}}'), "'a' comes twice"),
    (placed(a=f"../{FIRST}"), "places a in '../model-00001-of-00002.safetensors', which names no"),
    (placed(a=f"/{FIRST}"), "which names no safetensors file of its folder"),
    (placed(a=".."), "which names no safetensors file of its folder"),
    (placed(a="pytorch_model.bin"), "names no safetensors file"),
    (placed(a=""), "which names no safetensors file of its folder"),
    (placed(a=7), "places a in 7, which names no"),
    (indexed({"weight_map": {"a": SECOND, "b": FIRST}}), f"places a in {SECOND}, and it is in {FIRST}"),
    (placed(c=SECOND), f"places c in {SECOND}, and it is in none"),
    (twice, "a is in"),
    (only("consolidated.safetensors"), "consolidated.safetensors is not read under its name"),
    (only("adapter_model.safetensors"), "holds an adapter (adapter_model.safetensors) without the model"),
    (only("pytorch_model.bin"), "pickled weights (pytorch_model.bin)"),
    (only(), f"holds no {SINGLE}"),
]


@pytest.mark.parametrize("damage, sentence", BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_a_folder_that_can_be_read_in_two_ways_or_none(
    damage: Callable[[Path], object], sentence: str, sharded: Path
) -> None:
    damage(sharded)
    with pytest.raises(BadInput) as refused:
        SafetensorsReader(sharded)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    save_file(TENSORS | {"c": torch.ones(1)}, sharded / SECOND)
    (sharded / FIRST).unlink()
    write_index(sharded, {"weight_map": {"a": SECOND, "b": SECOND}})
    with pytest.raises(BadInput, match=f"places c in no file, and it is in {SECOND}"):
        SafetensorsReader(sharded)


def entry(first: int, last: int, *shape: object, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [first, last]}


HEADERS = [
    ([], "has a damaged header"),
    ({"a": 7}, "has a damaged header at a"),
    ({"a": entry(0, 8, 2.0)}, "has a damaged header at a"),
    ({"a": entry(0, 8, -2)}, "has a damaged header at a"),
    ({"a": entry(0, 8, True, 2)}, "has a damaged header at a"),
    ({"a": entry(-8, 0, 2)}, "has a damaged header at a"),
    ({"a": entry(0, 8, 2, dtype=["F32"])}, "has a damaged header at a"),
    ({"a": entry(0, 8, 3)}, "a has another size than its shape says"),
    ({"a": entry(0, 8, 2), "b": entry(4, 8, 1)}, "b starts at byte"),
    ({"a": entry(0, 4, 1), "b": entry(8, 12, 1)}, "b starts at byte"),
    ({"a": entry(0, 12, 3)}, "it is truncated or damaged"),
    ({"a": entry(0, 1 << 62, 1 << 60)}, "it is truncated or damaged"),
    ({"a": entry(0, 8, 2, dtype="I32")}, "a in"),
    ({"a.qweight": entry(0, 8, 2, dtype="I32")}, "a.qweight, a mark of GPTQ or AWQ"),
    ({"a.weight_packed": entry(0, 8, 2)}, "a mark of compressed-tensors"),
    ({"a.weight_scale": entry(0, 8, 2)}, "a mark of fp8 or int8 with one scale per matrix"),
    (
        {"a": entry(0, 8, 8, dtype="F8_E5M2")},
        "type F8_E5M2, and only F32, BF16, F16, F8_E4M3 are",
    ),
    ({"a": entry(0, 8, 8, dtype="I8")}, "is of type I8, and only"),
    ({"a": entry(0, 8, 2), "a_scale_inv": entry(8, 8, 0)}, "a is F32: a tensor with scales must be F8_E4M3"),
    ({"a_scale_inv": entry(0, 8, 2)}, "a is not there: a tensor with scales must be F8_E4M3"),
]


@pytest.mark.parametrize("header, sentence", HEADERS, ids=[sentence[:40] for _, sentence in HEADERS])
def test_a_header_that_lies(header: object, sentence: str, tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE, json.dumps(header).encode(), 8)
    with pytest.raises(BadInput) as refused:
        SafetensorsReader(tmp_path)
    assert sentence in str(refused.value)


def write_raw(path: Path, header: bytes, data_bytes: int) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(data_bytes))


@pytest.mark.parametrize(
    ("header", "sentence"),
    [
        (b'{"a": 1, "a": 2}', "'a' comes twice"),
        (b"[" * 100_000, "has a damaged header"),
        (b"\xff{}", "has a damaged header"),
        (b'{"a": ' + b"1" * 5000 + b"}", "has a damaged header"),
    ],
)
def test_a_header_that_is_no_json(header: bytes, sentence: str, tmp_path: Path) -> None:
    write_raw(tmp_path / SINGLE, header, 0)
    with pytest.raises(BadInput, match=sentence):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("length", [0, 2, 1 << 40, (1 << 64) - 1])
def test_a_header_whose_length_lies(length: int, tmp_path: Path) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}" + bytes(3))
    with pytest.raises(BadInput, match="copy it again"):
        SafetensorsReader(tmp_path)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS | {"none": torch.zeros(0, 3)}, tmp_path / SINGLE, metadata={"format": "pt"})
    assert SafetensorsReader(tmp_path).shapes() == {
        name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / SINGLE).items()
    }
