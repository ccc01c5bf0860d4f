"""Preferences: the masks of the bound, and the loss of a pair."""

import math

import numpy as np
import pytest
import torch

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.schema import BlockGrid, PreferenceConfig, PreferenceForm
from llada_megatron.objectives.bound import complementary_count_mask
from llada_megatron.objectives.preference import preference_losses

L, BLOCK = 22, 8
STARTS = block_starts(np.array([0, L]), BLOCK, BlockGrid.document)
SUPERVISED = np.arange(L) >= 5  # a prompt that ends inside a block


@pytest.mark.parametrize("draws", [2, 6])
def test_a_mask_and_its_complement_score_every_token_once(draws):
    for document in range(20):
        for draw in range(0, draws, 2):
            first, second = (
                complementary_count_mask(3, document, draw + half, draws, STARTS, SUPERVISED)[0]
                for half in (0, 1)
            )
            assert (first.astype(int) + second == SUPERVISED).all()


@pytest.mark.parametrize("draws", [1, 2, 4])
def test_the_weights_are_one_in_expectation(draws):
    """The sum over k of P(k) weight(k) k/m is 1 for every token that is scored."""
    found = np.array(
        [
            np.mean(
                [complementary_count_mask(5, n, d, draws, STARTS, SUPERVISED)[1] for d in range(draws)],
                axis=0,
            )
            for n in range(3000)
        ]
    )
    expected = SUPERVISED.astype(float)
    error = found.std(axis=0) / math.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - expected) <= 4.5 * error).all()


def test_masks_belong_to_the_document_and_not_to_its_place():
    alone = complementary_count_mask(1, 7, 0, 2, STARTS, SUPERVISED)
    moved = complementary_count_mask(1, 7, 0, 2, STARTS + 64, SUPERVISED)
    other = complementary_count_mask(1, 8, 0, 2, STARTS, SUPERVISED)
    assert (alone[0] == moved[0]).all() and (alone[1] == moved[1]).all()
    assert not (alone[0] == other[0]).all()


@pytest.mark.parametrize("form", list(PreferenceForm))
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_gradient_of_the_loss_is_that_of_finite_differences(form, smoothing):
    settings = PreferenceConfig(form=form, beta=0.3, label_smoothing=smoothing)
    reward = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    assert torch.autograd.gradcheck(lambda r: preference_losses(r, settings), reward.requires_grad_())


def test_a_policy_that_is_its_reference_loses_log_two():
    nothing = torch.zeros(3, 2, dtype=torch.float64)
    assert torch.allclose(preference_losses(nothing, PreferenceConfig()), torch.tensor(math.log(2)).double())
    better = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    for form in PreferenceForm:
        settings = PreferenceConfig(form=form, beta=0.1)
        assert preference_losses(better, settings) < preference_losses(-better, settings)
