"""Likelihoods of continuations against sums over all masks by hand, in any batch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.evaluate.continuation import Likelihood, Pair, Scorer, of_windows, windows
from llada_megatron.generate.reference_loop import Canvas, look
from llada_megatron.generate.rules import Figures
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups
from tests.generate.models import MASK, prompt_of, settings, tiny

CONFIG = settings()
CLOSE = 2e-4
"""Of sums of a few cross entropies in fp32, each of them about 10 nats."""


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(CONFIG)
    finally:
        groups.destroy()


def pair_of(context: int, continuation: int, number: int = 0, seed: int = 0) -> Pair:
    return Pair(number, prompt_of(context, seed), prompt_of(continuation, seed + 1))


def scored(model, pairs: list[Pair], block_size: int, **options) -> list[Likelihood]:
    found = {each.number: each for each in Scorer(CONFIG, model, block_size, **options).run(pairs)}
    return [found[pair.number] for pair in pairs]


def bound_by_hand(model, pair: Pair, block_size: int) -> float:
    """The sum over blocks, counts and all subsets of that count; each block read without those behind it."""
    tokens = np.concatenate([pair.context, pair.continuation])
    total = 0.0
    for start in range(0, len(tokens), block_size):
        end = min(start + block_size, len(tokens))
        members = [i for i in range(start, end) if i >= len(pair.context)]
        for k in range(1, len(members) + 1):
            subsets = list(combinations(members, k))
            for masked in subsets:
                canvas = Canvas(tokens.copy(), block_size, MASK)
                canvas.tokens[list(masked)] = MASK
                logits = look(model, canvas, start, end, Figures.logits)["logits_mV"].astype(np.float64)
                log_p = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
                nats = -sum(log_p[i - start, tokens[i]] for i in masked)
                total += nats / k / len(subsets)  # 1/m for the count, m/k for the sum
    return -total


SHAPES = [(0, 6, 4), (3, 6, 4), (8, 5, 4), (5, 4, 32)]


@pytest.mark.parametrize(("context", "continuation", "block_size"), SHAPES, ids=str)
def test_the_estimate_is_the_sum_over_all_masks_within_its_error(model, context, continuation, block_size):
    pair = pair_of(context, continuation)
    ((one),) = scored(model, [pair], block_size, draws=64)
    expected = bound_by_hand(model, pair, block_size)
    assert one.se is not None and 0 < one.se < 0.1 * abs(expected)
    assert abs(one.nats - expected) < 4 * one.se


@pytest.mark.parametrize("draws", [1, 2, 4], ids="draws{}".format)
def test_the_estimate_has_no_bias_whatever_the_number_of_draws(model, draws):
    pair, numbers = pair_of(3, 6), range(300)
    same = [Pair(number, pair.context, pair.continuation) for number in numbers]
    found = np.array([each.nats for each in scored(model, same, 4, draws=draws)])
    error = found.std(ddof=1) / len(found) ** 0.5
    assert len(set(found.tolist())) > 50 or draws > 1
    assert abs(found.mean() - bound_by_hand(model, pair, 4)) < 4 * error


def test_block_one_and_single_tokens_are_exact_in_one_draw(model):
    for pair, block_size in ((pair_of(3, 6), 1), (pair_of(0, 4), 1), (pair_of(5, 1), 4)):
        ((one),) = scored(model, [pair], block_size, draws=8)
        assert one.se == 0
        assert one.nats == pytest.approx(bound_by_hand(model, pair, block_size), abs=CLOSE)


def next_token_log_p(model, tokens: np.ndarray) -> np.ndarray:
    """log p [L, V] of what follows each token."""
    mask = BlockDiffusionMask([torch.tensor([0, len(tokens)])], 1, clean_copy=False, causal=True)
    rows = torch.arange(len(tokens))
    inputs = ModelInputs(torch.from_numpy(tokens)[None], rows[None], ContextShard(mask), rows, readout=LOGITS)
    with torch.no_grad():
        return model(inputs).double().log_softmax(dim=-1).numpy()


def test_an_autoregressive_model_is_exact_and_knows_what_greedy_decoding_writes(model):
    pair = pair_of(4, 5)
    greedy = list(pair.context)
    for _ in range(5):
        greedy.append(int(next_token_log_p(model, np.array(greedy))[-1].argmax()))
    nearly = [*greedy[:-1], (greedy[-1] + 1) % 480]
    pairs = [pair, *(Pair(n, pair.context, text[4:]) for n, text in ((1, greedy), (2, nearly)))]
    for each, found, is_greedy in zip(pairs, scored(model, pairs, 0), (False, True, False), strict=True):
        tokens = np.concatenate([each.context, each.continuation])
        log_p = next_token_log_p(model, tokens)[3:-1]
        assert found.nats == pytest.approx(log_p[range(5), each.continuation].sum(), abs=CLOSE)
        assert (found.se, found.is_greedy) == (0, is_greedy)
    with pytest.raises(BadInput, match="give a context"):
        scored(model, [pair_of(0, 3)], 0)


@pytest.mark.parametrize("block_size", [0, 1, 4, 96], ids="block{}".format)
def test_no_batch_or_order_changes_a_likelihood(model, block_size):
    lengths = [(3, 6), (20, 1), (1, 11), (9, 0), (30, 17)]
    pairs = [pair_of(c, n, number, seed=number) for number, (c, n) in enumerate(lengths)]
    together = scored(model, pairs, block_size, draws=4, seed=5)
    apart = scored(model, pairs[::-1], block_size, draws=4, seed=5, tokens=1)[::-1]
    for one, other in zip(together, apart, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=CLOSE)
        assert one.se == pytest.approx(other.se, abs=CLOSE) and one.is_greedy == other.is_greedy
    assert together[3].nats == 0
    if block_size > 1:
        others = scored(model, pairs, block_size, draws=4, seed=6)
        assert others[0].nats != together[0].nats
        assert others[1].nats == pytest.approx(together[1].nats, abs=CLOSE)  # one token: nothing is drawn


def test_what_is_not_served_is_refused(model):
    with pytest.raises(BadInput, match="3 draws: give 1 or an even number"):
        Scorer(CONFIG, model, 4, draws=3)
    with pytest.raises(BadInput, match=r"set layout\.cp=1"):
        Scorer(settings("layout.cp=2", "layout.processes=2", "layout.global_batch=4"), model, 4)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("context", "continuation"), [(0, 25), (3, 4), (9, 8), (1, 30), (12, 3), (0, 0)])
def test_windows_score_each_token_once_with_as_much_context_as_there_is_room_for(
    context, continuation, exact
):
    length, first = 10, context or int(exact)
    whole = np.arange(first + continuation)
    pairs = windows(7, whole[:first], whole[first:], length, exact=exact)
    np.testing.assert_array_equal(np.concatenate([pair.continuation for pair in pairs]), whole[first:])
    assert [pair.number for pair in pairs] == [7 * 2**20 + window for window in range(len(pairs))]
    for pair in pairs:
        both = np.concatenate([pair.context, pair.continuation])
        assert len(both) <= length and (len(pair.context) or not exact or not len(both))
        if len(both):
            np.testing.assert_array_equal(both, np.arange(both[0], both[-1] + 1))
            assert len(both) == min(length, both[-1] + 1)
    assert len(pairs) == 1 or context + continuation > length


def test_windows_of_a_text_add_up():
    found = [Likelihood(0, -2.0, 0.3, True), Likelihood(1, -3.0, 0.4, False)]
    assert of_windows(5, found) == Likelihood(5, -5.0, pytest.approx(0.5), False)
    assert of_windows(5, [*found, Likelihood(2, -1.0, None)]) == Likelihood(5, -6.0, None, None)
