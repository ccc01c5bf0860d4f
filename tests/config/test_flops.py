import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.config.flops import expected_pairs, training_flops_per_sequence
from llada_megatron.config.schema import ModelConfig

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


@pytest.mark.parametrize(("head_recomputed", "head_passes"), [(False, 6), (True, 8)])
def test_flops_equal_a_count_by_hand(head_recomputed, head_passes):
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8  # q, k and v, output
    dense = attention + 3 * 8 * 24
    moe = attention + 3 * 8 * (3 * 5 + 7) + 8 * 16  # three routed experts, the shared one, the router
    positions, pairs, supervised = 20, 130, 6
    scores_and_values = 3 * 2 * (2 * 4 * 2)  # forward and twice that backward, for two products
    by_hand = (
        6 * (dense + moe) * positions + 2 * scores_and_values * pairs + head_passes * 8 * 100 * supervised
    )
    counted = training_flops_per_sequence(
        DENSE_THEN_MOE,
        positions=positions,
        pairs=pairs,
        supervised=supervised,
        head_recomputed=head_recomputed,
    )
    assert counted == by_hand


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
@pytest.mark.parametrize(("clean_copy", "causal"), [(True, False), (False, True), (False, False)])
def test_expected_pairs_are_the_mask_s_for_one_document(block_size, clean_copy, causal):
    mask = BlockDiffusionMask([torch.tensor([0, 32])], block_size, clean_copy=clean_copy, causal=causal)
    assert expected_pairs(32, block_size, clean_copy=clean_copy, causal=causal) == mask.visible_pairs()
    assert mask.visible_pairs() == int(mask.dense().sum())
