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
    for batch, cached, prefill in ((1, 0, 1024), (3, 0, 5), (8, 64, 1024)):
        ours = decoder(models[name], rule, batch=batch, max_cached_tokens=cached, prefill_tokens=prefill)
        results = ours.results(prompts, limits)
        for tokens, result in zip(expected, results, strict=True):
            np.testing.assert_array_equal(result.tokens, tokens)
            assert result.stop is Stop.length and result.forwards["denoise"] == NEW
        assert ours.pages.available == ours.pages.count and ours.cache_bytes > 0
        again = ours.counts.rows - sum(LENGTHS) - len(LENGTHS) * (NEW - 1)
        assert bool(again) == bool(ours.counts.put_back) == (cached > 0)  # else every token once


@pytest.mark.parametrize(
    "name", ["means", *(pytest.param(each, marks=pytest.mark.slow) for each in [*CONFIGS][1:])]
)
def test_prompts_that_begin_alike_are_read_once(models, name):
    model, alike = models[name], prompt_of(70)
    prompts = [np.append(alike, prompt_of(length)) for length in (1, 9, 4)]
    ours = decoder(model, DRAWN, batch=1)
    for number, result in enumerate(ours.results(prompts, Limits(8))):
        draws = Draws(3, number)
        expected = next_tokens(model, prompts[number], 8, DRAWN, mask_token_id=MASK, draws=draws)
        np.testing.assert_array_equal(result.tokens, expected)
    assert ours.counts.shared_tokens == 2 * 64  # whole pages
    assert ours.counts.rows == sum(map(len, prompts)) + 3 * 7 - 2 * 64
    ours.results([prompts[0][:64]], Limits(1))  # a row is left to say the next token
    assert ours.counts.shared_tokens == 2 * 64 + 32


def test_the_backbone_runs_once_for_a_concept(models):
    ours = decoder(models["means"], batch=1)
    (result,) = ours.results([prompt_of(17)], Limits(60))
    assert ours.counts.forwards == len(result.tokens) == 60
    finished = len(ours.concepts.concepts_of(np.arange(ours.pages.count)))
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
    ],
)
def test_what_is_for_blocks_is_refused(models, options, said):
    with pytest.raises(BadInput, match=said):
        decoder(models["means"], **options)


def test_there_is_a_token_to_go_on_from_no_hole_and_room(models):
    ours = decoder(models["means"])
    with pytest.raises(BadInput, match="Prompt 0 is empty"):
        ours.results([[]], Limits(2))
    with pytest.raises(BadInput, match="Prompt 0 has holes"):
        ours.results([Prompt([1, MASK, 2], has_holes=True)], Limits(2))
    with pytest.raises(BadInput, match=r"Prompt 0 takes 64 .* max_cached_tokens is 50"):
        decoder(models["means"], max_cached_tokens=50).results([prompt_of(40)], Limits(2))


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
