"""The loss of a batch is sum_i w_i CE_i / count; uniform logits make every CE_i ln V."""

import math
from functools import cache

import numpy as np
import pytest

from llada_megatron.config.schema import Denominator, DiffusionConfig, RatePer, Weight
from llada_megatron.objectives.corruption import Corruption, corrupt
from llada_megatron.objectives.weights import embedding_noise_sigma, position_weights

L, BLOCK, VOCABULARY = 64, 4, 512
DOCUMENTS = np.array([0, 10, 33, L])
LOW, HIGH = 0.05, 0.9
SAMPLES = 20_000


@cache
def corruptions(t_per: RatePer, complementary: bool, low: float, high: float, samples: int):
    """Drawn once for all weights and denominators, which they do not know."""
    diffusion = DiffusionConfig(
        t_per=t_per, complementary=complementary, mask_rate_min=low, mask_rate_max=high
    )
    return [corrupt(3, index, DOCUMENTS, BLOCK, diffusion) for index in range(samples)]


def sums_and_counts(diffusion: DiffusionConfig, cross_entropy: np.ndarray, samples: int = SAMPLES):
    drawn = corruptions(
        diffusion.t_per, diffusion.complementary, diffusion.mask_rate_min, diffusion.mask_rate_max, samples
    )
    rows = [position_weights(each, diffusion, DOCUMENTS) for each in drawn]
    sums = np.array([weights @ cross_entropy for weights, _ in rows])
    return sums, np.array([count for _, count in rows])


def ratio_and_error(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """sum / count over a large batch and its standard error (delta method)."""
    ratio = sums.sum() / counts.sum()
    return ratio, (sums - ratio * counts).std() / counts.mean() / math.sqrt(len(sums))


@pytest.mark.parametrize(
    ("denominator", "expected"),
    [
        (Denominator.tokens, math.log(VOCABULARY)),
        (Denominator.masked, math.log(VOCABULARY) * 2 / (LOW + HIGH)),
        (Denominator.sequence, math.log(VOCABULARY)),
        (Denominator.document, math.log(VOCABULARY)),
        (Denominator.batch, math.log(VOCABULARY) * L),
    ],
)
@pytest.mark.parametrize("t_per", list(RatePer))
def test_uniform_logits_give_ln_v(denominator, expected, t_per):
    diffusion = DiffusionConfig(denominator=denominator, t_per=t_per, mask_rate_min=LOW, mask_rate_max=HIGH)
    ratio, error = ratio_and_error(*sums_and_counts(diffusion, np.full(L, math.log(VOCABULARY))))
    assert abs(ratio - expected) < 4 * error
    assert error < 0.02 * expected


def test_flat_weights_give_the_mean_over_masked_positions():
    diffusion = DiffusionConfig(weight=Weight.flat, denominator=Denominator.masked)
    ratio, _ = ratio_and_error(*sums_and_counts(diffusion, np.full(L, math.log(VOCABULARY)), 50))
    assert ratio == pytest.approx(math.log(VOCABULARY), rel=1e-12)


def test_per_block_and_per_sequence_rates_agree_in_expectation():
    cross_entropy = np.random.default_rng(0).exponential(size=L)  # any CE that does not depend on the mask
    means = []
    for t_per in RatePer:
        diffusion = DiffusionConfig(t_per=t_per, mask_rate_min=LOW, mask_rate_max=HIGH)
        means.append(ratio_and_error(*sums_and_counts(diffusion, cross_entropy)))
    (sequence, sequence_error), *others = means
    for mean, error in others:
        assert abs(sequence - mean) < 4 * math.hypot(sequence_error, error)
    block, block_error = others[-1]
    assert abs(block - cross_entropy.mean()) < 4 * block_error


def test_complementary_samples_have_the_same_expectation():
    diffusion = DiffusionConfig(complementary=True, mask_rate_min=0.1, mask_rate_max=0.9)
    cross_entropy = np.random.default_rng(0).exponential(size=L)
    sums, counts = sums_and_counts(diffusion, cross_entropy)
    pair_sums, pair_counts = (array.reshape(-1, 2).sum(axis=1) for array in (sums, counts))
    ratio, error = ratio_and_error(pair_sums, pair_counts)
    assert abs(ratio - cross_entropy.mean()) < 4 * error


EXAMPLE = Corruption(
    masked=np.array([True, False, True, False]), rate=np.array([0.5, 0.5, 0.25, 0.25])
)  # 1/t is 2 and 4
ONE_AND_THREE = np.array([0, 1, 4])


@pytest.mark.parametrize(
    ("denominator", "weights", "count"),
    [
        (Denominator.tokens, [2, 0, 4, 0], 4),
        (Denominator.masked, [2, 0, 4, 0], 2),
        (Denominator.sequence, [0.5, 0, 1, 0], 1),
        (Denominator.document, [2, 0, 4 / 3, 0], 2),
        (Denominator.batch, [2, 0, 4, 0], 1),
    ],
)
def test_each_denominator_by_hand(denominator, weights, count):
    made, added = position_weights(EXAMPLE, DiffusionConfig(denominator=denominator), ONE_AND_THREE)
    assert made.tolist() == weights and added == count


def test_prompts_are_not_counted_as_maskable():
    maskable = np.array([True, False, True, False])
    assert position_weights(EXAMPLE, DiffusionConfig(), ONE_AND_THREE, maskable)[1] == 2
    sequence = DiffusionConfig(denominator=Denominator.sequence)
    assert position_weights(EXAMPLE, sequence, ONE_AND_THREE, maskable)[0].tolist() == [1, 0, 2, 0]
    document = DiffusionConfig(denominator=Denominator.document)
    weights, count = position_weights(EXAMPLE, document, ONE_AND_THREE, maskable)
    assert weights.tolist() == [2, 0, 4, 0] and count == 2
    only_prompt = np.array([False, False, True, False])  # the first document has nothing to learn
    assert position_weights(EXAMPLE, document, ONE_AND_THREE, only_prompt)[1] == 1


@pytest.mark.parametrize("weight", list(Weight))
@pytest.mark.parametrize("denominator", list(Denominator))
def test_an_empty_mask_contributes_zero(weight, denominator):
    nothing = Corruption(masked=np.zeros(4, dtype=bool), rate=np.zeros(4))
    diffusion = DiffusionConfig(weight=weight, denominator=denominator)
    weights, count = position_weights(nothing, diffusion, ONE_AND_THREE)
    assert weights.tolist() == [0, 0, 0, 0]
    assert count == {"tokens": 4, "masked": 0, "sequence": 1, "document": 2, "batch": 1}[denominator]


def test_embedding_noise_fades_linearly_to_zero_and_stays_there():
    assert [embedding_noise_sigma(2.0, 100, tokens) for tokens in (0, 50, 100, 150)] == [2.0, 1.0, 0.0, 0.0]
    assert embedding_noise_sigma(0.0, 0, 0) == 0.0
