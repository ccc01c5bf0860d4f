"""Sequences cut to a random length: which, where, and that nothing of the rest is seen, masked or counted."""

from __future__ import annotations

import numpy as np
import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.data.packed import PackedSample
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.random_length import at_random_length

L, MASK = 64, 257
STAGE = "schedule.stages=[{name: a, block_size: '%s', tokens: 4096, objective: %s}]"


def text(starts: list[int]) -> PackedSample:
    return PackedSample(
        np.arange(L), np.array(starts, dtype=np.int32), document_ids=np.arange(len(starts) - 1)
    )


def test_a_share_is_cut_at_lengths_that_are_uniform_and_depend_on_seed_and_index_alone() -> None:
    sample, share, number = text([0, L]), 0.25, 4000
    cut = [at_random_length(sample, 1, index, share) for index in range(number)]
    lengths = [int(one.supervised.sum()) for one in cut if one.supervised is not None]
    assert abs(len(lengths) / number - share) < 4 * (share * (1 - share) / number) ** 0.5
    assert min(lengths) == 1 and max(lengths) == L
    assert abs(np.mean(lengths) - (L + 1) / 2) < 4 * L / 12**0.5 / len(lengths) ** 0.5
    again = at_random_length(sample, 1, 7, 1.0)
    assert np.array_equal(again.supervised, at_random_length(text([0, 3, L]), 1, 7, 1.0).supervised)
    assert not np.array_equal(again.supervised, at_random_length(sample, 2, 7, 1.0).supervised)
    assert at_random_length(sample, 1, 0, 0.0) is sample


def test_documents_end_where_the_sequence_does() -> None:
    for index in range(200):
        cut = at_random_length(text([0, 10, 40, L]), 1, index, 1.0)
        n = int(cut.supervised.sum())
        assert cut.supervised[:n].all() and n in cut.cu_seqlens
        assert sorted({0, 10, 40, L, n}) == cut.cu_seqlens.tolist() and cut.cu_seqlens.dtype == np.int32
        assert len(cut.document_ids) == len(cut.cu_seqlens) - 1
        pieces = np.searchsorted(cut.cu_seqlens, [0, 10, 40], side="right") - 1
        assert cut.document_ids[pieces].tolist() == [0, 1, 2]
    chat = PackedSample(np.arange(L), np.array([0, L]), supervised=np.arange(L) > 30)
    assert at_random_length(chat, 1, 0, 1.0) is chat


@pytest.mark.parametrize("block_size", ["full", "8"])
def test_what_is_cut_off_is_not_masked_not_counted_and_not_seen(block_size: str) -> None:
    config = compose(
        [
            *("experiment=parity", f"data.sequence_length={L}", "diffusion.random_length_share=1"),
            *("diffusion.mask_rate_min=1", "diffusion.mask_rate_max=1", STAGE % (block_size, "diffusion")),
        ]
    )
    schedule = rules.check(config)
    data = {index: text([0, 20, L]) for index in range(4)}
    objective = Diffusion("diffusion", config, schedule)
    lengths = [int(each.supervised.sum()) for each in objective.read(data, range(4))]
    batch = objective.batch(data, list(range(4)), schedule.stages[0])
    assert batch.counts == (sum(lengths),) and len(batch.rows["weights"]) == sum(lengths)
    masked_BL = batch.inputs.tokens[:, :L] == config.model.mask_token_id
    assert masked_BL.sum(dim=1).tolist() == lengths
    for number, n in enumerate(lengths):
        halves = (
            batch.inputs.keys.mask.dense(number).unflatten(0, (-1, L)).unflatten(2, (-1, L))
        )  # [halves, L, halves, L]
        assert not halves[:, :n, :, n:].any() and not halves[:, n:, :, :n].any()


def test_other_objectives_refuse_it() -> None:
    settings = ["experiment=parity", "data.sequence_length=64", "diffusion.random_length_share=0.01"]
    with pytest.raises(BadInput, match=r"random_length_share=0.01 cuts .* trains multi_block: set it to 0"):
        rules.check(compose([*settings, STAGE % ("8", "multi_block")]))
    assert rules.check(compose([*settings, STAGE % ("1", "autoregressive")]))
