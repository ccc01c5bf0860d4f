"""Decoding with a cache, in batches and in any order gives the tokens of the loop without either."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.parameters import cached_token_bytes
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate import BlockChanged, Decoder, Limits, Prompt, PromptRead, Result, Stop
from llada_megatron.generate.reference_loop import Canvas, reference_loop
from llada_megatron.generate.rules import RULES, Change, Rule, rule_of
from llada_megatron.generate.rules.editing import Soft
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny, uncached

RULE = rule_of("threshold", {"threshold": 0.05})
"""Of a random model's probabilities some are higher: blocks take a few forwards, unequal in number."""


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(settings())
    finally:
        groups.destroy()


def decoder(model, **options):
    return Decoder(
        model, **({"rule": RULE, "block_size": 4, "mask_token_id": MASK, "context": CONTEXT} | options)
    )


@pytest.mark.parametrize("length", [0, 5, 31, 32, 33], ids="prompt{}".format)
@pytest.mark.parametrize("block_size", [1, 4, 32], ids="block{}".format)
def test_a_cached_prompt_equals_the_loop_without_a_cache(model, block_size, length):
    prompt = prompt_of(length)
    (result,) = decoder(model, block_size=block_size).results([prompt], Limits(new_tokens=23))
    expected, forwards = uncached(model, prompt, 23, block_size, RULE)
    np.testing.assert_array_equal(result.tokens, expected)
    assert result.stop is Stop.length and result.forwards == {"prefill": 0, "denoise": forwards, "store": 0}
    assert 1 <= result.forwards["denoise"] <= 23 + 4


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_rule_in_a_batch_equals_itself_alone_without_a_cache(model, name):
    rule, lengths = rule_of(name), (3, 8, 13)
    prompts = [prompt_of(length) for length in lengths]
    results = decoder(model, rule=rule, batch=2, seed=3).results(prompts, Limits(new_tokens=10))
    for number, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        expected, _ = uncached(model, prompt, 10, 4, rule, number=number, seed=3)
        np.testing.assert_array_equal(result.tokens, expected, err_msg=f"prompt {number}")


def test_pools_of_experts_are_those_of_the_loop_without_a_cache(model):
    pooled = tiny(settings("model.expert_capacity=6"))
    ours = decoder(pooled, batch=2, prefill_tokens=4)
    results = ours.results([prompt_of(13), prompt_of(8)], Limits(new_tokens=10))
    for length, result in zip((13, 8), results, strict=True):
        expected, _ = uncached(pooled, prompt_of(length), 10, 4, RULE)
        np.testing.assert_array_equal(result.tokens, expected)
    assert (uncached(model, prompt_of(8), 10, 4, RULE)[0] != expected).any()


LENGTHS = (17, 2, 40, 9, 33, 1, 24)


@pytest.fixture(scope="module")
def alone(model):
    """The tokens behind each of the prompts, without a cache."""
    return [uncached(model, prompt_of(length), 21, 4, RULE)[0] for length in LENGTHS]


@pytest.mark.parametrize(
    ("batch", "cached", "prefill_tokens"), [(1, 64, 4), (2, 0, 1024), (3, 64, 1024), (8, 80, 4), (8, 0, 4)]
)
def test_no_batch_bound_or_chunk_changes_a_token(model, alone, batch, cached, prefill_tokens):
    prompts = [prompt_of(length) for length in LENGTHS]
    limits = Limits(new_tokens=21)
    ours = decoder(model, batch=batch, max_cached_tokens=cached, prefill_tokens=prefill_tokens)
    largest = 0
    results = []
    for event in ours.run(prompts, limits):
        largest = max(largest, ours.pages.count - ours.pages.available)
        results += [event] if isinstance(event, Result) else []
    assert sorted(result.prompt for result in results) == list(range(len(prompts)))
    for result in results:
        np.testing.assert_array_equal(result.tokens, alone[result.prompt], err_msg=f"prompt {result.prompt}")
    assert ours.pages.count - ours.pages.available == 0  # nobody holds a page any more
    if cached:
        assert largest <= cached // 4 and (ours.counts.put_back > 0) == (batch > 1)


@torch.no_grad()
def test_block_one_equals_a_loop_that_appends_one_mask_and_reads_its_position(model):
    tokens = prompt_of(9).tolist()
    for _ in range(12):
        longer = torch.tensor([[*tokens, MASK]])
        mask = BlockDiffusionMask([torch.tensor([0, longer.numel()])], 1, clean_copy=False, causal=True)
        inputs = ModelInputs(
            tokens=longer,
            positions=torch.arange(longer.numel())[None],
            keys=ContextShard(mask),
            outputs=torch.tensor([len(tokens)]),
            readout=LOGITS,
        )
        logits = model(inputs)[0]
        logits[MASK] = -torch.inf
        tokens.append(int(logits.argmax()))
    (result,) = decoder(model, block_size=1).results([tokens[:9]], Limits(new_tokens=12))
    assert result.tokens.tolist() == tokens[9:]
    assert result.forwards["denoise"] == 12


def test_a_prefix_that_was_read_before_is_not_read_again(model):
    prompt = prompt_of(40)
    ours = decoder(model)
    (first,) = ours.results([prompt], Limits(new_tokens=22))
    rows = ours.counts.rows
    turn = np.concatenate([prompt, first.tokens, prompt_of(5, seed=1)])  # 67 tokens, the last 7 of them new
    (second,) = ours.results([turn], Limits(new_tokens=6))
    assert ours.counts.shared_tokens == 60  # whole blocks that a later one has seen: the last one nobody kept
    assert ours.counts.rows - rows == 4 + 4 * second.forwards["denoise"] + 4 * 2
    np.testing.assert_array_equal(second.tokens, uncached(model, turn, 6, 4, RULE)[0])
    # Under a bound what nobody uses makes room, and what it held is computed again.
    small = decoder(model, max_cached_tokens=72)
    for each in (prompt, prompt_of(44, seed=2), prompt):
        (result,) = small.results([each], Limits(new_tokens=22))
        np.testing.assert_array_equal(result.tokens, uncached(model, each, 22, 4, RULE)[0])


def test_prompts_of_one_batch_that_begin_alike_share_pages_as_far_as_they_are_alike(model):
    prompt = prompt_of(32)
    prompts = [prompt, np.append(prompt[:30], [7, 8]), np.append(prompt, 9)]
    ours = decoder(model, batch=1)
    for each, result in zip(prompts, ours.results(prompts, Limits(new_tokens=9)), strict=True):
        np.testing.assert_array_equal(result.tokens, uncached(model, each, 9, 4, RULE)[0])
    assert ours.counts.shared_tokens == 28 + 32


def test_an_abandoned_run_leaves_no_page_behind_and_the_next_one_is_right(model):
    ours = decoder(model, batch=2)
    events = ours.run([prompt_of(20), prompt_of(30)], Limits(new_tokens=20))
    next(events)
    assert ours.pages.available < ours.pages.count
    events.close()
    assert ours.pages.available == ours.pages.count
    (result,) = ours.results([prompt_of(30)], Limits(new_tokens=20))
    np.testing.assert_array_equal(result.tokens, uncached(model, prompt_of(30), 20, 4, RULE)[0])


def test_holes_are_filled_and_what_was_given_stays(model):
    tokens = prompt_of(30)
    tokens[[3, 9, 10, 17, 18, 19, 29]] = MASK
    expected, forwards = reference_loop(model, Canvas(tokens.copy(), 4, MASK), RULE)
    (result,) = decoder(model).results([Prompt(tokens, has_holes=True)], Limits(new_tokens=0))
    np.testing.assert_array_equal(result.tokens, expected)
    assert (result.generated, result.forwards["denoise"], result.stop) == (7, forwards, Stop.length)
    assert ((result.decided_at == 0) == (tokens != MASK)).all() and result.decided_at.max() == forwards
    (untouched,) = decoder(model).results([Prompt(expected, has_holes=True)], Limits(new_tokens=0))
    np.testing.assert_array_equal(untouched.tokens, expected)


def test_a_draft_stands_where_masks_would_and_a_rule_that_edits_mends_it(model):
    limits, draft = Limits(new_tokens=14), prompt_of(9, seed=1)
    leaves = decoder(model, rule=rule_of("joint", {"edit_threshold": 1.0}))
    (left,) = leaves.results([Prompt(prompt_of(6), draft=draft)], limits)
    np.testing.assert_array_equal(left.tokens[:9], draft)
    assert len(left.tokens) == left.generated == 14 and (left.decided_at[:9] == 0).all()
    (mended,) = decoder(model, rule=rule_of("joint")).results([Prompt(prompt_of(6), draft=draft)], limits)
    assert mended.is_edited[:9].any() and (mended.decided_at[mended.is_edited] > 0).all()


def test_changes_of_blocks_add_up_to_the_result(model):
    prompt = prompt_of(6)
    text, decided_at, events = np.full(32, -1), np.zeros(32, np.int64), 0
    for event in decoder(model).run([prompt], Limits(new_tokens=17)):
        if isinstance(event, BlockChanged):
            block, events = slice(event.first, event.first + 4), events + 1
            now = np.where(event.is_masked, -1, event.tokens)
            decided_at[block][(now != text[block]) & (np.arange(32)[block] >= 6)] = events
            text[block] = now
            assert event.is_done == (not event.is_masked.any())
    np.testing.assert_array_equal(text[4:23], [*prompt[4:], *event.tokens])
    np.testing.assert_array_equal(event.decided_at, decided_at[6:23])
    assert events == event.forwards["denoise"] and event.tokens_per_forward == 17 / events


def words(ids):
    return "".join(f"{token} " for token in ids)


def test_decoding_ends_at_an_end_token_a_string_the_length_the_context_or_after_forwards(model):
    prompt = prompt_of(10)
    ours = decoder(model, text=words)
    (whole,) = ours.results([prompt], Limits(new_tokens=30))
    assert whole.stop is Stop.length and len(whole.tokens) == 30 and whole.text == words(whole.tokens)
    at = next(n for n in range(9, 30) if whole.tokens[n] not in whole.tokens[:n])
    end = int(whole.tokens[at])
    (result,) = ours.results([prompt], Limits(new_tokens=30, end_tokens=[end]))
    assert result.stop is Stop.end and result.tokens.tolist() == whole.tokens[: at + 1].tolist()
    assert result.forwards["denoise"] < whole.forwards["denoise"]
    string = words(whole.tokens[at : at + 1])[:-1] + " "
    (result,) = ours.results([prompt], Limits(new_tokens=30, strings=["no such", " " + string]))
    assert result.stop is Stop.string and result.text == words(whole.tokens[:at])[:-1]
    assert result.tokens.tolist() == whole.tokens[: at + 1].tolist()
    (result,) = ours.results([prompt], Limits(new_tokens=200))
    assert result.stop is Stop.context and len(result.tokens) == CONTEXT - 10
    (result,) = ours.results([prompt], Limits(new_tokens=30, forwards=3))
    assert result.stop is Stop.forwards and sum(result.forwards.values()) == 3
    assert (
        result.tokens.tolist() == whole.tokens[: len(result.tokens)].tolist() and 1 <= len(result.tokens) < 30
    )


def test_a_long_prompt_is_told_forward_by_forward_and_may_be_left_while_it_is_read(model):
    ours, prompt = decoder(model, prefill_tokens=16), prompt_of(61)
    read = [event for event in ours.run([prompt], Limits(new_tokens=4)) if isinstance(event, PromptRead)]
    assert read == [PromptRead(0, tokens, 60) for tokens in (16, 32, 48)]
    ours = decoder(model, prefill_tokens=16)
    next(ours.run([prompt], Limits(new_tokens=4)))
    assert ours.counts.forwards == 1 and ours.pages.available == ours.pages.count
    (result,) = ours.results([prompt], Limits(new_tokens=4))
    np.testing.assert_array_equal(result.tokens, uncached(model, prompt, 4, 4, RULE)[0])
    assert ours.counts.shared_tokens == 16


def test_a_block_ends_where_nothing_that_is_wanted_can_change_any_more(model):
    one_by_one = rule_of("threshold", {"threshold": 1.0})
    ours = decoder(model, block_size=32, rule=one_by_one, text=words)
    prompt = prompt_of(32)
    expected, forwards = uncached(model, prompt, 32, 32, one_by_one)
    for new in (1, 3, 8):
        (result,) = ours.results([prompt], Limits(new_tokens=new))
        np.testing.assert_array_equal(result.tokens, expected[:new])
    (result,) = ours.results([prompt], Limits(new_tokens=1))
    assert result.forwards["denoise"] < forwards == 32
    (string,) = ours.results([prompt], Limits(new_tokens=32, strings=[words(expected[:1])]))
    assert string.forwards == result.forwards and string.stop is Stop.string
    assert not result.is_edited.any()
    edits = decoder(model, block_size=32, rule=rule_of("joint"))  # whose tokens may still change
    (result,) = edits.results([prompt], Limits(new_tokens=1))
    assert result.tokens == uncached(model, prompt, 1, 32, rule_of("joint"))[0]
    (result,) = edits.results([prompt], Limits(new_tokens=32))
    assert result.is_edited.any() and (result.decided_at[result.is_edited] > 1).all()


@dataclass(frozen=True)
class Halves(Rule):
    """Fills all at once, reads half of each token in the block's second forward, and is done unchanged."""

    def decide(self, seen, state):
        tokens = np.where(seen.is_masked_m, seen.choice_m, seen.tokens_m)
        return Change(tokens, seen.step == 1, weight_m=np.where(seen.is_prompt_m, 1, 0.5))

    edits = True


@pytest.mark.parametrize("batch", [1, 3])
def test_kept_keys_are_those_of_whole_tokens_and_so_is_what_is_given(model, batch):
    read = []

    def spied(inputs):
        weights = torch.ones(inputs.tokens.shape) if inputs.soft is None else inputs.soft.weights
        read.extend(zip(inputs.positions[0].tolist(), weights[0].tolist(), strict=True))
        return model(inputs)

    ours = decoder(model, rule=Halves(), batch=batch, max_cached_tokens=64)
    ours.graphs = spied
    lengths = (17, 9, 33)
    for length, result in zip(
        lengths, ours.results(map(prompt_of, lengths), Limits(new_tokens=18)), strict=True
    ):
        np.testing.assert_array_equal(result.tokens, uncached(model, prompt_of(length), 18, 4, Halves())[0])
    if batch == 1:  # the first prompt has one token of block 16..20, which is given
        first = [weight for position, weight in read if position in (16, 17)]
        assert first[:6] == [1, 1, 1, 0.5, 1, 1]  # masks, halves, and the forward that keeps them
    else:
        assert ours.counts.put_back > 0


@dataclass(frozen=True)
class Hard(Soft):
    """Soft decoding that reads as much of each token."""

    weight: float | None = None

    def decide(self, seen, state):
        weight = None if self.weight is None else np.full(len(seen.tokens_m), self.weight)
        return replace(super().decide(seen, state), weight_m=weight)


def test_soft_decoding_that_is_sure_everywhere_is_hard_decoding(model):
    prompts, limits = [prompt_of(13), prompt_of(8)], Limits(new_tokens=24)
    hard, sure, half = (
        [result.tokens.tolist() for result in decoder(model, rule=rule).results(prompts, limits)]
        for rule in (Hard(0.05), Hard(0.05, weight=1.0), Hard(0.05, weight=0.5))
    )
    assert sure == hard != half


def test_an_end_that_is_taken_back_ends_nothing(model):
    rule, prompt, limits = rule_of("remdm_rescale", {"eta": 1, "steps": 8}), prompt_of(8), Limits(12)
    ours, stood = decoder(model, rule=rule), set()
    for event in ours.run([prompt], limits):
        stood |= set(event.tokens.tolist()) - {MASK}
    taken_back = stood - set(event.tokens.tolist()) - set(prompt.tolist())
    assert isinstance(event, Result) and event.is_edited.any() and taken_back
    (again,) = ours.results([prompt], replace(limits, end_tokens=taken_back))
    assert again.stop is Stop.length and again.tokens.tolist() == event.tokens.tolist()
    (ended,) = ours.results([prompt], replace(limits, end_tokens=event.tokens[[5]].tolist()))
    assert ended.stop is Stop.end and ended.tokens.tolist() == event.tokens[:6].tolist()


@pytest.mark.usefixtures("model")  # its process groups
def test_a_model_in_bf16_keeps_its_keys_in_bf16_and_decodes_the_same_tokens():
    half = tiny(settings("precision=bf16"))
    ours = decoder(half, max_cached_tokens=64)
    for length in (9, 16):
        prompt = prompt_of(length)
        (result,) = ours.results([prompt], Limits(new_tokens=8))
        np.testing.assert_array_equal(result.tokens, uncached(half, prompt, 8, 4, RULE)[0])
    assert ours.cache_bytes == 2 * 4 * (64 + 1) * 2 * 32 * 2


def test_the_cache_takes_the_bytes_that_are_known_beforehand(model):
    ours, config = decoder(model, max_cached_tokens=64), settings()
    ours.results([prompt_of(5)], Limits(new_tokens=4))
    assert ours.cache_bytes == (64 + 1) * cached_token_bytes(config.model, config.precision, config.layout)
    assert ours.cache_bytes == 2 * 4 * (64 + 1) * 2 * 32 * 4  # layers, tokens, heads, width, bytes


def test_what_cannot_be_decoded_is_refused_in_a_sentence(model):
    for options, prompt, new, sentence in (
        ({}, prompt_of(97), 1, "Prompt 0 has 97 tokens, and the model's context of 96 has no room for more"),
        ({}, prompt_of(96), 1, "Prompt 0 has 96 tokens"),
        ({"block_size": 97}, [1], 1, "A block of 97 is no part of the model's context of 96"),
        ({}, [1, MASK, 2], 1, "Prompt 0 holds the mask token, 500, at position 1: remove it."),
        (
            {"max_cached_tokens": 32},
            prompt_of(9),
            24,
            "takes 36 cached tokens with what is generated",
        ),
    ):
        with pytest.raises(BadInput, match=sentence):
            decoder(model, **options).results([prompt], Limits(new_tokens=new))
    with pytest.raises(BadInput, match="Prompt 0 has a draft, which this rule would leave as it is: give"):
        decoder(model).results([Prompt([1], draft=[2])])
    with pytest.raises(BadInput, match="a draft of 3 tokens, and 2 new ones are wanted: ask for more"):
        decoder(model, rule=rule_of("joint")).results([Prompt([1], draft=[2, 3, 4])], Limits(2))
