"""Decoding next tokens gives those of a loop that computes everything anew, in any batch and by any model."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config, LayoutConfig
from llada_megatron.generate import BlockChanged, Limits, Prompt, PromptRead, Result, Stop
from llada_megatron.generate.branches import Lookahead
from llada_megatron.generate.next_tokens import NextTokenDecoder
from llada_megatron.generate.reference_loop import next_tokens
from llada_megatron.generate.rules import Draws, rule_of
from llada_megatron.parallel import groups
from tests.distributed import run_ranks
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny

RULE = rule_of("ar")
DRAWN = rule_of("ar", {"temperature": 1.0, "top_k": 40, "top_p": 0.9})
LENGTHS = (17, 2, 40, 9, 1)
NEW = 20
OWN = "model.concepts.concept=boundary_token"


def concepts(*overrides: str) -> Config:
    return compose(["experiment=dlcm_parity", "model.init_std=0.3", *overrides])


CONFIGS = {"means": concepts(), "first tokens": concepts(OWN), "autoregressive": settings()}


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, torch.nn.Module]]:
    groups.initialize(LayoutConfig())
    try:
        yield {name: tiny(config) for name, config in CONFIGS.items()}
    finally:
        groups.destroy()


def decoder(model, rule=RULE, **options) -> NextTokenDecoder:
    return NextTokenDecoder(
        model, rule, block_size=0, mask_token_id=MASK, **({"context": CONTEXT, "seed": 3} | options)
    )


@pytest.mark.parametrize(
    "rule", [pytest.param(RULE, id="best", marks=pytest.mark.slow), pytest.param(DRAWN, id="drawn")]
)
@pytest.mark.parametrize(
    "name", ["means", *(pytest.param(each, marks=pytest.mark.slow) for each in [*CONFIGS][1:])]
)
def test_tokens_are_those_of_a_loop_without_a_cache_in_any_batch(models, name, rule):
    prompts, limits = [prompt_of(length) for length in LENGTHS], Limits(NEW)
    expected = [
        next_tokens(models[name], prompt, NEW, rule, mask_token_id=MASK, draws=Draws(3, number))
        for number, prompt in enumerate(prompts)
    ]
    for batch, cached, prefill in ((1, 0, 1024), (3, 0, 5), (8, 2 * CONTEXT, 1024)):
        ours = decoder(models[name], rule, batch=batch, max_cached_tokens=cached, prefill_tokens=prefill)
        results = ours.results(prompts, limits)
        for tokens, result in zip(expected, results, strict=True):
            np.testing.assert_array_equal(result.tokens, tokens)
            assert result.stop is Stop.length and result.forwards["denoise"] == NEW
        assert ours.pages.available == ours.pages.count and ours.cache_bytes > 0
        assert ours.counts.rows == sum(LENGTHS) + len(LENGTHS) * (NEW - 1)  # every token once


def test_the_backbone_runs_once_for_a_concept(models):
    ours = decoder(models["means"], batch=1)
    (result,) = ours.results([prompt_of(17)], Limits(60))
    assert ours.counts.forwards == len(result.tokens) == 60
    finished = int(ours.concepts.concepts[0])
    assert ours.concepts.backbone_rows == finished
    assert 5 < ours.concepts.backbone_forwards < 60 and finished < 17 + 60


def test_events_tell_of_the_prompt_and_of_each_token(models):
    events = list(decoder(models["means"], prefill_tokens=8).run([prompt_of(30)], Limits(3)))
    assert [type(event) for event in events] == [PromptRead] * 3 + [BlockChanged] * 3 + [Result]
    assert [event.tokens for event in events[:3]] == [8, 16, 24]
    assert [event.first for event in events[3:6]] == [30, 31, 32]
    assert all(event.is_done and not event.is_masked.any() for event in events[3:6])
    (full,) = decoder(models["means"]).results([prompt_of(90)], Limits(50))
    assert full.stop is Stop.context and len(full.tokens) == CONTEXT - 90


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rule": rule_of("joint")}, "has no blocks"),
        ({"lookahead": Lookahead(2)}, "has no blocks"),
        ({"cuda_graphs": True}, "has no blocks"),
        ({"max_cached_tokens": 50}, "max_cached_tokens is 50"),
    ],
)
def test_what_is_for_blocks_is_refused(models, options, said):
    with pytest.raises(BadInput, match=said):
        decoder(models["means"], **options)


def test_there_is_a_token_to_go_on_from_and_no_hole(models):
    ours = decoder(models["means"])
    with pytest.raises(BadInput, match="Prompt 0 is empty"):
        ours.results([[]], Limits(2))
    with pytest.raises(BadInput, match="Prompt 0 has holes"):
        ours.results([Prompt([1, MASK, 2], has_holes=True)], Limits(2))


def decoded(overrides: list[str]) -> list[list[int]] | str:
    config = concepts(*overrides)
    torch.set_num_threads(1)
    groups.initialize(config.layout)
    try:
        ours = decoder(tiny(config), DRAWN, batch=2)
    except BadInput as fault:
        return str(fault)
    return [result.tokens.tolist() for result in ours.results([prompt_of(n) for n in LENGTHS], Limits(12))]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["model.concepts.concept=mean", OWN])
def test_every_layout_decodes_the_tokens_of_one_process(form):
    (alone,) = run_ranks(decoded, [form])
    for layout in ([], ["layout.tp=2"], ["layout.tp=2", "layout.ep=2"]):
        given = [form, "layout.processes=2", *layout]
        assert run_ranks(decoded, given, processes=2) == [alone, alone]
    refused = run_ranks(decoded, [form, "layout.processes=2", "layout.ep=2"], processes=2)
    assert all("set layout.ep and layout.etp" in said for said in refused)
