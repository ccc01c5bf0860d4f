"""Roles beside a corpus, and what a corpus may be used for."""

import json
from pathlib import Path

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import DataConfig
from llada_megatron.data.conversations import PackedConversations
from llada_megatron.data.corpus import read_index
from llada_megatron.data.packed import refuse_pairs
from tests.foreign.conversations import make_corpus

DATA = DataConfig(sequence_length=32, pad_to=4)


def packed(prefix: Path) -> PackedConversations:
    index = read_index(str(prefix))
    return PackedConversations(index, np.arange(len(index.document_lengths)), DATA, seed=1)


def test_bytes_that_are_no_roles_are_refused(tmp_path):
    make_corpus(tmp_path)
    assert packed(tmp_path / "pairs")[0]["roles"].max() >= 0x80
    roles = tmp_path / "pairs.roles.bin"
    roles.write_bytes(bytes([6]) + roles.read_bytes()[1:])
    with pytest.raises(BadInput, match=r"pairs\.roles\.bin is damaged"):
        for number in range(2):
            packed(tmp_path / "pairs")[number]


@pytest.mark.parametrize("format", ["chat", None])
def test_what_says_which_texts_are_pairs_is_asked_for(tmp_path, format):
    """As chats, each text is a conversation; where it is lost, nobody knows."""
    make_corpus(tmp_path)
    sidecar = json.loads((tmp_path / "pairs.json").read_text())
    (tmp_path / "pairs.json").write_text(json.dumps({**sidecar, "format": format}))
    if format is None:
        with pytest.raises(BadInput, match="missing or damaged, which says what"):
            packed(tmp_path / "pairs")
    else:
        assert len(packed(tmp_path / "pairs")[0]["document_ids"]) == 4


def test_other_objectives_than_a_preference_refuse_pairs(tmp_path):
    make_corpus(tmp_path)
    pairs = DataConfig(path=[f"{tmp_path}/pairs"])
    refuse_pairs(pairs, ["preference"])
    with pytest.raises(BadInput, match="objective diffusion would learn the rejected ones"):
        refuse_pairs(pairs, ["preference", "diffusion"])
    (tmp_path / "pairs.roles.idx").unlink()
    refuse_pairs(pairs, ["diffusion"])
