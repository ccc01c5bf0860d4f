"""The family dlcm with what is kept of sequences: the logits of the whole, whatever a forward reads."""

import numpy as np
import pytest
import torch

from llada_megatron.attention.keys import PoolPart
from llada_megatron.model.concept_cache import CachedConcepts, ConceptCache
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from tests.model.test_dlcm import DENSE, built, given, one_process  # noqa: F401 - a fixture

LENGTHS, LONGEST, PAGE = (48, 31, 17), 64, 8
ONE_BY_ONE = [[(text, 1) for text in range(3)]] * 48
"""(text, rows) of each forward."""
UNEVEN = [[(1, 20)], [(0, 7), (1, 1)], [(2, 17), (0, 1), (1, 5)], *[[(2, 3), (1, 1), (0, 2)]] * 20]


def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=generator) for length in LENGTHS]


def room() -> ConceptCache:
    return ConceptCache(len(LENGTHS) * LONGEST // PAGE, PAGE)


def concepts(cache: ConceptCache) -> list[int]:
    """Of each text."""
    pages = np.arange(cache.pages).reshape(len(LENGTHS), -1)
    return [len(cache.concepts_of(of_text)) for of_text in pages]


def piecewise(
    model: torch.nn.Module, forwards: list[list[tuple[int, int]]], cache: ConceptCache
) -> list[torch.Tensor]:
    """Logits of each text, [n, V], by forwards of some rows of some of them."""
    tokens = texts()
    said: list[list[torch.Tensor]] = [[] for _ in tokens]
    read = [0] * len(tokens)
    for forward in forwards:
        taken = [(text, min(rows, len(tokens[text]) - read[text])) for text, rows in forward]
        taken = [(text, rows) for text, rows in taken if rows]
        if not taken:
            continue
        parts = [PoolPart(read[text], text * LONGEST + np.arange(read[text] + rows)) for text, rows in taken]
        keys = CachedConcepts(cache, parts)
        row = torch.cat([tokens[text][read[text] : read[text] + rows] for text, rows in taken])
        positions, outputs = torch.from_numpy(keys.positions), torch.arange(len(row))
        logits = model(ModelInputs(row[None], positions[None], keys, outputs, readout=LOGITS))
        for (text, rows), part in zip(taken, logits.split([rows for _, rows in taken]), strict=True):
            said[text].append(part)
            read[text] += rows
    return [torch.cat(parts) for parts in said if parts]


MEANS = ("model.concepts.concept=mean", "model.concepts.attention=ragged")
REPLICATED = ("model.concepts.concept=mean", "model.concepts.attention=replicated")
FIRST = ("model.concepts.concept=boundary_token", "model.concepts.boundary_grad=ste")


@pytest.mark.parametrize(
    ("form", "experts"),
    [
        pytest.param(MEANS, True, id="means experts"),
        pytest.param(FIRST, False, id="first tokens"),
        *(
            pytest.param(*case, id=" ".join(map(str, case)), marks=pytest.mark.slow)
            for case in ((MEANS, False), (FIRST, True), (REPLICATED, False), (REPLICATED, True))
        ),
    ],
)
@torch.no_grad()
def test_logits_are_those_of_the_whole(form: tuple[str, ...], experts: bool) -> None:
    """Routers count in fp32 whatever the weights are, and so far rows round in the place of another."""
    model = built(*form, *([] if experts else DENSE)).double().eval()
    whole = [model(given(text[None], [[0, len(text)]])) for text in texts()]
    for forwards in (ONE_BY_ONE, UNEVEN, [[(0, 48), (1, 31), (2, 17)]]):
        cache = room()
        for mine, expected in zip(piecewise(model, forwards, cache), whole, strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6 if experts else 1e-12)
        opened = concepts(cache)
        assert all(5 < count < length for count, length in zip(opened, LENGTHS, strict=True))
        assert cache.backbone_rows == sum(opened)


@pytest.mark.parametrize("form", [MEANS, pytest.param(FIRST, marks=pytest.mark.slow)])
@torch.no_grad()
def test_texts_that_begin_alike_share_pages_and_their_concepts(form: tuple[str, ...]) -> None:
    """A full page says how its sequence goes on, wherever it ends in a concept."""
    model = built(*form, *DENSE).double().eval()
    text, cache = texts()[0], room()
    piecewise(model, [[(0, 21)], [(0, 27)]], cache)  # over ends of pages
    pages, opened = len(text) // PAGE, concepts(cache)[0]
    for shared in range(pages):
        own = np.arange(LONGEST, LONGEST + len(text) - shared * PAGE)  # pages that had other tokens before
        places = np.append(np.arange(shared * PAGE), own)
        keys = CachedConcepts(cache, [PoolPart(shared * PAGE, places)])
        row, positions = text[None, shared * PAGE :], torch.from_numpy(keys.positions)[None]
        said = model(ModelInputs(row, positions, keys, torch.arange(row.shape[1]), readout=LOGITS))
        whole = model(given(text[None], [[0, len(text)]]))[shared * PAGE :]
        torch.testing.assert_close(said, whole, rtol=0, atol=1e-12)
        assert len(cache.concepts_of(places[::PAGE] // PAGE)) == opened == concepts(cache)[0]
    assert cache.backbone.places == cache.seen.places <= 2 * opened + PAGE + 1  # grown by what was opened


@torch.no_grad()
def test_in_fp32_logits_are_those_of_the_whole_and_the_backbone_runs_for_concepts_alone() -> None:
    model = built().eval()
    whole = model(given(texts()[0][None], [[0, LENGTHS[0]]]))
    cache = room()
    mine, *_ = piecewise(model, [[(0, 1)]] * 47, cache)
    scale = whole.abs().max()
    assert (mine - whole[:47]).abs().max() < 2e-5 * scale
    assert cache.backbone_forwards == cache.backbone_rows == concepts(cache)[0] < 47


@torch.no_grad()
def test_rows_of_no_sequence_have_no_concepts_and_change_nothing() -> None:
    model = built("model.concepts.concept=boundary_token", *DENSE).double().eval()
    text, said = texts()[2], []
    whole = model(given(text[None], [[0, len(text)]]))
    cache = ConceptCache(LONGEST // PAGE, PAGE)
    for place in range(len(text)):
        nobody = PoolPart(0, np.full(3, LONGEST))
        keys = CachedConcepts(cache, [PoolPart(place, np.arange(place + 1)), nobody])
        row, positions = torch.cat([text[[place]], text[:3]])[None], torch.from_numpy(keys.positions)[None]
        said.append(model(ModelInputs(row, positions, keys, torch.tensor([0]), readout=LOGITS)))
    torch.testing.assert_close(torch.cat(said), whole, rtol=0, atol=1e-12)
    assert cache.backbone_rows == len(cache.concepts_of(np.arange(cache.pages)))
    assert not len(cache.concepts_of(np.array([cache.pages])))


@torch.no_grad()
def test_a_sequence_takes_nothing_of_the_one_that_had_its_place_before() -> None:
    model = built(*DENSE).eval()
    cache = room()
    first = piecewise(model, ONE_BY_ONE, cache)
    for mine, before in zip(piecewise(model, ONE_BY_ONE, cache), first, strict=True):
        assert torch.equal(mine, before)
