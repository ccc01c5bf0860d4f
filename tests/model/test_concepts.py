"""Boundaries, means, smoothing and what tokens see of concepts, on the smallest rows that show them."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from llada_megatron.model.concepts import (
    Segments,
    boundary_probability,
    chosen_probability,
    opened,
    parser_loss,
    parser_slope,
    pooled_mean,
    sharpened,
    smoothed,
)
from llada_megatron.model.cross_attention import attend, sight

OPENED = np.array([1, 0, 0, 1, 0, 1, 1, 1, 0, 0, 0, 1], dtype=bool)
STARTS = np.array([0, 7])
SEGMENTS = Segments(OPENED, STARTS)


def test_sharpening_pushes_to_the_nearer_end_and_keeps_one_half_apart() -> None:
    p = torch.tensor([0.0, 0.1, 0.49, 0.5, 0.9, 1.0], dtype=torch.float64)
    expected = [0.0, 1 - 0.9 ** (1 / 6), 1 - 0.51 ** (1 / 6), 0.5 ** (1 / 6), 0.9 ** (1 / 6), 1.0]
    assert_close(sharpened(p, 6.0), torch.tensor(expected, dtype=torch.float64))


def test_documents_open_a_concept_whatever_was_drawn() -> None:
    p = torch.full((12,), 0.1)
    starts = torch.from_numpy(STARTS)
    for draws in (None, torch.full((12,), 0.5)):
        assert opened(p, starts, draws).nonzero()[:, 0].tolist() == STARTS.tolist()
    draws = torch.linspace(0, 1, 12)
    assert opened(p, starts, draws).nonzero()[:, 0].tolist() == [0, 1, 7]
    probability = boundary_probability(torch.randn(12, 4), torch.randn(12, 4), starts)
    assert probability[starts].tolist() == [1, 1] and ((probability > 0) & (probability < 1)).sum() == 10


def test_the_parsers_slope_is_the_derivative_and_vanishes_at_the_target() -> None:
    G = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(parser_loss(0.4, G, 4.0), G)
    assert math.isclose(float(slope), parser_slope(0.4, 4.0)) and parser_slope(0.25, 4.0) == 0
    assert parser_loss(0.25, 0.9, 4.0) == pytest.approx(0) and parser_loss(0.5, 0.0, 4.0) < 0


def test_smoothing_is_the_recursive_average_and_so_is_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, generator=generator, dtype=torch.float64).requires_grad_()
    rows = []
    for a, concept in zip(weight, concepts, strict=True):
        rows.append(a * concept + (1 - a) * (rows[-1] if rows else torch.zeros_like(concept)))
    assert_close(smoothed(concepts, weight), torch.stack(rows))
    assert torch.autograd.gradcheck(smoothed, (concepts, weight))


def test_the_straight_through_factor_is_one_and_has_a_gradient_of_both_signs() -> None:
    p = torch.tensor([0.3, 0.8], requires_grad=True)
    factor = chosen_probability(p, torch.tensor([False, True]))
    assert factor.tolist() == [1, 1]
    assert torch.autograd.grad(factor.sum(), p)[0].tolist() == [-1, 1]


def test_a_mean_is_of_its_concepts_tokens_and_padding_has_none() -> None:
    hidden = torch.arange(12.0)[:, None]
    lengths = torch.from_numpy(np.append(SEGMENTS.lengths, 0))
    found = pooled_mean(hidden, torch.from_numpy(SEGMENTS.concept), lengths)[:, 0]
    assert found.tolist() == [1, 3.5, 5, 6, 8.5, 11, 0]


def visible(own: bool) -> torch.Tensor:
    """Who sees which of [start, concepts], by its definition, bool [T, 1 + M]."""
    concept, document = torch.from_numpy(SEGMENTS.concept), torch.from_numpy(SEGMENTS.document)
    of_concept = document[torch.from_numpy(SEGMENTS.first)]
    m = torch.arange(SEGMENTS.count)
    seen = (of_concept == document[:, None]) & ((m <= concept[:, None]) if own else (m < concept[:, None]))
    return torch.cat([torch.ones(len(concept), 1, dtype=torch.bool), seen], dim=1)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_ragged_and_replicated_attention_are_the_dense_one(own: bool, backend: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    query, key, value = drawn(12, 1, 4, 6), drawn(7, 1, 2, 6), drawn(7, 1, 2, 6)
    scores = torch.einsum("tbhgd,kbhd->hgtk", query.unflatten(2, (2, 2)), key) * 6**-0.5
    weights = scores.masked_fill(~visible(own), -torch.inf).softmax(dim=-1)
    dense = torch.einsum("hgtk,kbhd->tbhgd", weights, value).flatten(2, 3)
    of_dense = torch.autograd.grad(dense.square().sum(), (query, key, value))
    for replicated in (False,) if own else (False, True):
        seen = sight(SEGMENTS, own=own, replicated=replicated)
        keys, values = (each[torch.from_numpy(seen.entry)] for each in (key, value))
        output = attend(query, keys, values, seen, backend)
        assert_close(output, dense)
        for ours, theirs in zip(
            torch.autograd.grad(output.square().sum(), (query, key, value)), of_dense, strict=True
        ):
            assert_close(ours, theirs)
    assert own or seen.copies.max() == 4


def test_log_copies_are_exact_in_bf16() -> None:
    """Of 1000 copies, whose logarithm has a rounding error of 0.02 in bf16."""
    is_opened = np.zeros(1003, dtype=bool)
    is_opened[[0, 2, 1002]] = True
    segments = Segments(is_opened, np.array([0]))
    value = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.bfloat16)[:, None, None, None].expand(4, 1, 1, 8)
    zero = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16)
    means = []
    for replicated in (True, False):
        seen = sight(segments, own=False, replicated=replicated)
        keys, entry = zero.expand(len(seen.entry), 1, 1, 8), torch.from_numpy(seen.entry)
        means.append(attend(zero.expand(1003, 1, 1, 8), keys, value[entry], seen, "reference")[-1, 0, 0, 0])
    assert means[0] == means[1] == torch.tensor(1 / 3).bfloat16()
