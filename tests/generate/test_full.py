"""Decoding where every position sees every other: as a plain loop, and what each cache reads."""

from __future__ import annotations

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate import BlockChanged, Limits, Prompt, Result, Stop
from llada_megatron.generate.branches import Lookahead
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.full import ALL, CACHES, FullAttention, FullDecoder, full_attention_of
from llada_megatron.generate.reference_loop import Canvas, look, reference_loop
from llada_megatron.generate.rules import RULES, Draws, Figures, rule_of
from llada_megatron.parallel import groups
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny

RULE = rule_of("threshold", {"threshold": 0.05})
LENGTHS = (17, 2, 40, 9)
NEW = 21


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(settings())
    finally:
        groups.destroy()


def decoder(model, **options):
    return FullDecoder(
        model, **({"rule": RULE, "block_size": 8, "mask_token_id": MASK, "context": CONTEXT} | options)
    )


def plain(model, prompt, new=NEW, block_size=8, rule=RULE, *, number=0, seed=0):
    """The `new` tokens behind a prompt by the loop without a cache, and its forwards."""
    tokens = np.append(prompt, np.full(new, MASK))
    canvas = Canvas(tokens, block_size, MASK, full_from=len(prompt))
    filled, forwards = reference_loop(model, canvas, rule, Draws(seed, number))
    return filled[len(prompt) :], forwards


@pytest.mark.parametrize("block_size", [1, 5, 32], ids="block{}".format)
@pytest.mark.parametrize("length", [0, 5], ids="prompt{}".format)
def test_without_a_cache_a_prompt_is_decoded_as_by_a_plain_loop(model, length, block_size):
    prompt = prompt_of(length)
    (result,) = decoder(model, block_size=block_size).results([prompt], Limits(new_tokens=NEW))
    expected, forwards = plain(model, prompt, block_size=block_size)
    np.testing.assert_array_equal(result.tokens, expected)
    assert result.stop is Stop.length and result.forwards == {"prefill": 0, "denoise": forwards, "store": 0}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_is_that_of_the_plain_loop(model, name):
    rule = rule_of(name, {"temperature": 0.5})
    results = decoder(model, rule=rule, seed=3).results([prompt_of(3), prompt_of(8)], Limits(new_tokens=10))
    for number, (length, result) in enumerate(zip((3, 8), results, strict=True)):
        expected, _ = plain(model, prompt_of(length), 10, rule=rule, number=number, seed=3)
        np.testing.assert_array_equal(result.tokens, expected)


@pytest.mark.parametrize(
    "cache",
    [
        "dual",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("none", "prefix", "vicinity", "guided")),
    ],
)
def test_no_batch_or_bound_changes_a_token(model, cache):
    full = CACHES.get(cache, FullAttention(before=4, after=4, cfg_scale=0.7))
    prompts, limits = [prompt_of(length) for length in LENGTHS], Limits(new_tokens=NEW)
    alone = [decoder(model, full=full).results([prompt], limits)[0].tokens for prompt in prompts]
    for batch, cached in ((2, 0), (4, 120 * full.copies)):
        ours = decoder(model, full=full, batch=batch, max_cached_tokens=cached)
        most = 0
        for event in ours.run(prompts, limits):
            most = max(most, ours.pages.count - ours.pages.available)
            if isinstance(event, Result):
                np.testing.assert_array_equal(event.tokens, alone[event.prompt])
        assert ours.pages.available == ours.pages.count
        assert not cached or 0 < most * 8 <= cached


def reads(model, full, monkeypatch):
    """Of each forward of one prompt the rows that were read and the figures that came of them."""
    ours, found = decoder(model, full=full, rule=rule_of("quota", {"threshold": 1.0, "steps": 4})), []
    forward = ours._forward

    def recorded(feeds):
        output = forward(feeds)
        found.extend((each.running.tokens.copy(), each.read, each.rows[0], output) for each in feeds)
        return output

    monkeypatch.setattr(ours, "_forward", recorded)
    ours.results([prompt_of(17)], Limits(new_tokens=NEW))
    return found


def whole(model, tokens, rows):
    """The figures of some rows by a forward of the whole sequence that knows no cache."""
    exact = decoder(model, rule=rule_of("quota"))
    running = exact.check(0, Prompt(tokens[:17]), Limits(new_tokens=NEW))
    running.tokens[:] = tokens
    assert exact.take_room(running)
    return exact.look(running, slice(0, len(tokens)), rows)


@pytest.mark.parametrize("cache", ["prefix", "dual", "vicinity"])
def test_a_cache_reads_the_rows_that_it_says_and_all_of_them_at_the_entry_of_a_block(
    model, cache, monkeypatch
):
    full = CACHES[cache] if cache != "vicinity" else FullAttention(before=3, after=2, warmup=2)
    found = reads(model, full, monkeypatch)
    expected = {"prefix": (0, 38), "dual": (0, 0), "vicinity": (3, 2)}[cache]
    steps, stale, before = 0, 0, None
    for tokens, read, rows, output in found:
        first = 17 + (rows[0] - 17) // 8 * 8
        steps, before = (steps + 1 if first == before else 0), first
        if steps < full.warmup:
            assert read == slice(0, 38)
            np.testing.assert_allclose(output, whole(model, tokens, rows), rtol=1e-4, atol=1e-6)
        else:
            behind = min(first + 8 + expected[1], 38)
            assert read == slice(first - expected[0], behind)
            stale += not np.allclose(output, whole(model, tokens, rows), rtol=1e-4, atol=1e-6)
    assert stale  # else nothing here tells a cache from none
    assert len(found) == 3 * 4


def test_a_cache_that_is_never_left_to_itself_is_none(model):
    limits, prompts = Limits(new_tokens=NEW), [prompt_of(17), prompt_of(5)]
    exact = decoder(model).results(prompts, limits)
    warm = decoder(model, full=FullAttention(before=0, after=0, warmup=ALL)).results(prompts, limits)
    wide = decoder(model, full=FullAttention(before=CONTEXT, after=CONTEXT)).results(prompts, limits)
    dual = decoder(model, full=CACHES["dual"])
    cold = dual.results(prompts, limits)
    for one, *others in zip(exact, warm, wide, strict=True):
        for other in others:
            np.testing.assert_array_equal(other.tokens, one.tokens)
    assert any((one.tokens != other.tokens).any() for one, other in zip(exact, cold, strict=True))


def test_guidance_is_two_forwards_put_together(model):
    prompt, scale = prompt_of(9), 0.7
    tokens = np.append(prompt, np.full(6, MASK))
    rule = rule_of("quota", {"threshold": 1.0})
    for _ in range(6):
        without = np.append(np.full(9, MASK), tokens[9:])
        pair = [
            look(model, Canvas(each, 15, MASK, full_from=9), 9, 15, Figures.logits)["logits_mV"].astype(float)
            for each in (tokens, without)
        ]
        logits = pair[1] + (scale + 1) * (pair[0] - pair[1])
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p = (p / p.sum(axis=1, keepdims=True)).max(axis=1) * (tokens[9:] == MASK)
        logits[:, MASK] = -np.inf
        tokens[9 + p.argmax()] = logits[p.argmax()].argmax()
    for name in ("quota", "entropy", "klass"):
        ours = decoder(model, rule=rule_of(name), block_size=6, full=FullAttention(cfg_scale=scale))
        (result,) = ours.results([prompt], Limits(new_tokens=6))
        assert name != "quota" or result.tokens.tolist() == tokens[9:].tolist()
    ours = decoder(model, rule=rule, block_size=6)
    assert ours.results([prompt], Limits(new_tokens=6))[0].tokens.tolist() != tokens[9:].tolist()


def test_a_random_order_fills_as_many_masks_whichever_they_are(model):
    rule = rule_of("quota", {"threshold": 1.0, "steps": 4, "random_order": True})
    orders = []
    for seed in (0, 1):
        (result,) = decoder(model, rule=rule, seed=seed).results([prompt_of(9)], Limits(new_tokens=16))
        assert result.forwards["denoise"] == 8
        assert np.bincount(result.decided_at).tolist() == [0] + [2] * 8
        orders.append(result.decided_at.tolist())
        expected, _ = plain(model, prompt_of(9), 16, rule=rule, seed=seed)
        np.testing.assert_array_equal(result.tokens, expected)
    assert orders[0] != orders[1]


def test_decoding_ends_at_an_end_token_the_length_the_context_or_after_forwards(model):
    prompt, ours = prompt_of(10), decoder(model, text=lambda ids: "".join(f"{token} " for token in ids))
    (all_of_it,) = ours.results([prompt], Limits(new_tokens=30))
    assert all_of_it.stop is Stop.length and len(all_of_it.tokens) == 30
    at = next(n for n in range(9, 30) if all_of_it.tokens[n] not in all_of_it.tokens[:n])
    end = int(all_of_it.tokens[at])
    (result,) = ours.results([prompt], Limits(new_tokens=30, end_tokens=[end]))
    assert result.stop is Stop.end and result.tokens.tolist() == all_of_it.tokens[: at + 1].tolist()
    assert result.forwards["denoise"] < all_of_it.forwards["denoise"]
    (result,) = ours.results([prompt], Limits(new_tokens=30, strings=[f" {end} "]))
    assert result.stop is Stop.string and result.tokens.tolist() == all_of_it.tokens[: at + 1].tolist()
    (result,) = ours.results([prompt], Limits(new_tokens=200))
    assert result.stop is Stop.context and len(result.tokens) == CONTEXT - 10
    (result,) = ours.results([prompt], Limits(new_tokens=30, forwards=2))
    assert result.stop is Stop.forwards and 1 <= len(result.tokens) < 30
    assert result.tokens.tolist() == all_of_it.tokens[: len(result.tokens)].tolist()


def test_blocks_count_from_the_prompts_end_and_changes_add_up_to_the_result(model):
    text, firsts = np.full(38, -1), []
    for event in decoder(model, full=CACHES["dual"]).run([prompt_of(17)], Limits(new_tokens=NEW)):
        if isinstance(event, BlockChanged):
            firsts.append(event.first)
            text[event.first :][: len(event.tokens)] = np.where(event.is_masked, -1, event.tokens)
    assert sorted(set(firsts)) == [17, 25, 33] == list(dict.fromkeys(firsts))
    np.testing.assert_array_equal(text[17:], event.tokens)


def test_holes_are_filled_and_what_was_given_stays(model):
    tokens = prompt_of(30)
    tokens[[3, 9, 10, 17, 18, 19, 29]] = MASK
    expected = tokens.copy()
    canvas = Canvas(expected, 30, MASK, full_from=0)
    reference_loop(model, canvas, RULE)
    (result,) = decoder(model, block_size=30).results([Prompt(tokens, has_holes=True)], Limits(new_tokens=0))
    np.testing.assert_array_equal(result.tokens, expected)
    (result,) = decoder(model).results([Prompt(tokens, has_holes=True)], Limits(new_tokens=4))
    assert ((result.tokens[:30] == tokens) == (tokens != MASK)).all() and len(result.tokens) == 34


def test_an_abandoned_run_leaves_no_room_taken(model):
    ours = decoder(model, batch=2)
    events = ours.run([prompt_of(20), prompt_of(30)], Limits(new_tokens=20))
    next(events)
    assert ours.pages.available < ours.pages.count
    events.close()
    assert ours.pages.available == ours.pages.count


def test_what_cannot_be_decoded_is_refused_in_a_sentence(model):
    for options, prompt, new, sentence in (
        ({}, prompt_of(97), 1, "Prompt 0 has 97 tokens, and the model's context of 96 has no room for more"),
        ({"block_size": 97}, [1], 1, "A block of 97 is no part of the model's context of 96"),
        ({}, [1, MASK, 2], 1, "Prompt 0 holds the mask token, 500, at position 1: remove it."),
        ({"max_cached_tokens": 24}, prompt_of(9), 24, "Prompt 0 takes 40 cached tokens with what is"),
    ):
        with pytest.raises(BadInput, match=sentence):
            decoder(model, **options).results([prompt], Limits(new_tokens=new))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"cache": "duel"}, "There is no cache 'duel': give none, prefix, dual, vicinity."),
        ({"cache": "dual", "behind": "1"}, "Full attention has no setting behind: give cache, before, after"),
        ({"before": "4"}, "Without a cache every row is read: leave --cache-before out, or give --cache"),
        ({"cache": "dual", "after": "-1"}, "after=-1 is out of range"),
        ({"cache": "dual", "after": "x"}, "after is 'x': give a whole number."),
        ({"cfg_scale": "-1"}, "cfg_scale=-1.0 is out of range"),
    ],
)
def test_settings_that_are_none_are_answered_in_a_sentence(given, sentence):
    with pytest.raises(BadInput) as refused:
        full_attention_of(given)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_setting_replaces_that_of_the_named_cache():
    assert full_attention_of({}) == FullAttention() and full_attention_of({}).is_exact
    assert full_attention_of({"cache": "vicinity", "after": "2"}) == FullAttention(16, 2, 4)
    assert full_attention_of({"cache": "prefix"}).read(1, 17, 25, 38) == slice(17, 38)
    assert full_attention_of({"cfg_scale": "1.5"}).copies == 2


@pytest.mark.parametrize("option", [{"buffer": Buffer(2)}, {"lookahead": Lookahead(1)}])
def test_blocks_and_branches_beside_the_active_one_are_refused(model, option):
    with pytest.raises(BadInput, match="here every position sees every other: leave them out"):
        decoder(model, **option)
