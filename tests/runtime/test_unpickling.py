"""The index of the shards: nothing it asks for is called, and it is believed where the files bear it out."""

import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.runtime.unpickling import read_metadata

SHARDS = Path(__file__).parents[1] / "old_run" / "run" / "checkpoints" / "step_00000003" / "shards"
TENSOR = "embedding.word_embeddings.weight"


def test_what_torch_wrote_is_read_as_torch_reads_it() -> None:
    ours, theirs = read_metadata(SHARDS), pickle.loads((SHARDS / ".metadata").read_bytes())
    assert ours.state_dict_metadata == theirs.state_dict_metadata
    assert ours.storage_data == theirs.storage_data


def far_away(metadata: Any) -> None:
    first(metadata).relative_path = "../../config.yaml"


def past_the_end(metadata: Any) -> None:
    first(metadata).length = 2**40


def backwards(metadata: Any) -> None:
    first(metadata).offset = -1


def transformed(metadata: Any) -> None:
    first(metadata).transform_descriptors = ["stream.zstd"]


def huge(metadata: Any) -> None:
    metadata.state_dict_metadata[TENSOR].size = (2**40, 16)


def huge_in_parts(metadata: Any) -> None:
    entry = metadata.state_dict_metadata[TENSOR]
    entry.size, entry.chunks[0].sizes = (2**40, 16), (2**40, 16)


def without_parts(metadata: Any) -> None:
    metadata.state_dict_metadata[TENSOR].chunks.clear()


def of_another_kind(metadata: Any) -> None:
    metadata.state_dict_metadata[TENSOR] = "a tensor"


def first(metadata: Any) -> Any:
    return next(iter(metadata.storage_data.values()))


@pytest.mark.parametrize(
    "change",
    [
        far_away, past_the_end, backwards, transformed, huge, huge_in_parts, without_parts, of_another_kind,
    ],
)  # fmt: skip
def test_an_index_that_the_files_do_not_bear_out_is_refused(
    tmp_path: Path, change: Callable[[Any], None]
) -> None:
    shutil.copytree(SHARDS, tmp_path, dirs_exist_ok=True)
    metadata = pickle.loads((SHARDS / ".metadata").read_bytes())
    change(metadata)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(BadInput, match=r"\.metadata is damaged: .*; take another checkpoint\.$"):
        read_metadata(tmp_path)


def test_classes_are_not_filled_and_a_memo_takes_no_memory(tmp_path: Path) -> None:
    # The class itself, then (None, {"hello": 1}) as the state that fills it.
    filled_class = (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x05\x00\x00\x00helloI1\ns\x86b."
    )
    for content in (
        filled_class,
        b"\x80\x02Nr\xff\xff\xff\x1f.",  # memo number 2 ** 29
        b"\x80\x02\x8e" + b"\xff" * 7 + b"\x0fx.",  # a text of 2 ** 60 bytes
    ):
        (tmp_path / ".metadata").write_bytes(content)
        with pytest.raises(BadInput, match="is damaged"):
            read_metadata(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # in KiB

    from torch.distributed.checkpoint.metadata import Metadata

    assert not hasattr(Metadata, "hello")
    pickle.loads(filled_class)
    assert hasattr(Metadata, "hello")  # what would have been done
    del Metadata.hello


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"holds no weights \(no \.metadata\)"):
        read_metadata(tmp_path / "shards")
