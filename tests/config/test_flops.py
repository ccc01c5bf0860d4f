import math
from bisect import bisect_left, bisect_right

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import DocumentLengths, expected_pairs, training_flops_per_sequence
from llada_megatron.config.schema import ModelConfig
from llada_megatron.data.synthetic import log_normal_documents

DENSE_THEN_MOE = ModelConfig(
    vocab_size=100,
    mask_token_id=99,
    layers=2,
    hidden_size=8,
    heads=4,
    kv_heads=2,
    head_dim=2,
    ffn_hidden_size=24,
    dense_layers=1,
    experts=16,
    experts_per_token=3,
    expert_hidden_size=5,
    shared_expert_hidden_size=7,
)


@pytest.mark.parametrize(
    ("head_recomputed", "head_passes", "last_positions"), [(False, 6, None), (True, 8, None), (False, 6, 10)]
)
def test_flops_equal_a_count_by_hand(head_recomputed, head_passes, last_positions):
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, output
    dense = attention + 3 * 8 * 24
    moe = attention + 3 * 8 * (3 * 5 + 7) + 8 * 16  # three routed experts, the shared one, the router
    positions, pairs, supervised = 20, 130, 6
    scores_and_values = 3 * 2 * (2 * 4 * 2)  # forward and twice that backward, for two products
    by_hand = (
        6 * (dense + moe) * positions + 2 * scores_and_values * pairs + head_passes * 8 * 100 * supervised
    )
    if last_positions:
        by_hand -= 6 * (moe - 8 * 8 - 2 * 8 * 4) * (positions - last_positions)  # q, k and v stay
    counted = training_flops_per_sequence(
        DENSE_THEN_MOE,
        positions=positions,
        pairs=pairs,
        supervised=supervised,
        head_recomputed=head_recomputed,
        last_positions=last_positions,
    )
    assert counted == by_hand


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
@pytest.mark.parametrize(("clean_copy", "causal"), [(True, False), (False, True), (False, False)])
def test_expected_pairs_are_the_mask_s_for_one_document(block_size, clean_copy, causal):
    mask = BlockDiffusionMask([torch.tensor([0, 32])], block_size, clean_copy=clean_copy, causal=causal)
    assert expected_pairs(32, block_size, clean_copy=clean_copy, causal=causal) == mask.visible_pairs()
    assert mask.visible_pairs() == int(mask.dense().sum())


@pytest.mark.parametrize("block_size", [1, 32, 512])
@pytest.mark.parametrize(("clean_copy", "causal"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("documents", [DocumentLengths(60, 1.0), DocumentLengths(400, 0.6)])
def test_expected_pairs_are_the_mean_over_windows_of_a_packed_stream(
    documents, block_size, clean_copy, causal
):
    length, windows = 512, 2000
    ends = log_normal_documents(
        math.log(documents.median_tokens), documents.sigma, seed=1, length=length * windows
    )
    samples = []
    for start in range(0, length * windows, length):
        inside = ends[bisect_right(ends, start) : bisect_left(ends, start + length)]
        samples.append(torch.tensor([0, *(end - start for end in inside), length]))
    seen = BlockDiffusionMask(samples, block_size, clean_copy=clean_copy, causal=causal).visible_pairs()
    expected = expected_pairs(length, block_size, clean_copy=clean_copy, causal=causal, documents=documents)
    assert expected == pytest.approx(seen / windows, rel=0.02)


def test_long_documents_count_as_one():
    one = expected_pairs(1024, 32, clean_copy=True, causal=False)
    long = expected_pairs(1024, 32, clean_copy=True, causal=False, documents=DocumentLengths(1e9, 0.5))
    assert long == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize("text", ["", "x", "665,1,2", "0", "665,0", "-3,1", "nan"])
def test_document_lengths_that_make_no_sense_are_refused(text):
    with pytest.raises(BadInput, match="give MEDIAN,SIGMA"):
        DocumentLengths.parse(text)
