"""Several active blocks and lookahead branches: the cache changes nothing, and where rules have to fill."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate import BlockChanged, Decoder, Limits, Prompt, Stop
from llada_megatron.generate.branches import Branch, Lookahead
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.methods import METHODS, Method, method_of
from llada_megatron.generate.reference_loop import recomputed
from llada_megatron.generate.rules import RULES, Seen, rule_of
from llada_megatron.generate.running import Running
from llada_megatron.parallel import groups
from tests.distributed import run_ranks
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny, uncached

LENGTHS = (17, 2, 40, 9)
RULE = rule_of("threshold", {"threshold": 0.05})
WAYS = {
    "two": Buffer(2, 0.1, 0.5),
    "all": Buffer(0, 0.3, 0.95),
    "late": Buffer(4, 1.0, 1.0),
    "early": Buffer(3, 0.0, 0.0),
}


def few(names, *quick):
    """Parameters of which these are for the quick tests."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(settings())
    finally:
        groups.destroy()


def decoder(model, method, **options):
    whole = {"block_size": 4, "mask_token_id": MASK, "context": CONTEXT, "batch": 2} | options
    return Decoder(model, method.rule, buffer=method.buffer, lookahead=method.lookahead, **whole)


def expected(model, prompt, method, number=0, seed=0, block_size=4, limits=Limits(new_tokens=19)):  # noqa: B008
    running = Running(
        number, Prompt(prompt), limits, block_size=block_size, mask_token_id=MASK, context=CONTEXT
    )
    return recomputed(model, running, method, seed)


def assert_as_without_a_cache(model, method, **options):
    ours = decoder(model, method, **options)
    seed = options.get("seed", 0)
    for number, result in enumerate(ours.results([prompt_of(n) for n in LENGTHS], Limits(new_tokens=19))):
        alone = expected(model, prompt_of(LENGTHS[number]), method, number, seed)
        np.testing.assert_array_equal(result.tokens, alone.tokens)
        np.testing.assert_array_equal(result.decided_at, alone.decided_at)
        assert result.forwards["denoise"] == alone.forwards["denoise"]
    assert ours.pages.available == ours.pages.count
    return ours


@pytest.mark.parametrize("name", few(WAYS, "two", "early"))
def test_with_any_buffer_the_cache_is_as_one_computed_anew(model, name):
    method = Method(rule_of("threshold", {"threshold": 0.05}), WAYS[name])
    assert_as_without_a_cache(model, method)
    ours = assert_as_without_a_cache(model, method, max_cached_tokens=64, prefill_tokens=8)
    assert ours.counts.put_back  # whose pages were taken meanwhile


@pytest.mark.parametrize("name", few(sorted({*RULES} - {"threshold"}), "factor"))
def test_every_rule_serves_a_buffer(model, name):
    assert_as_without_a_cache(model, Method(rule_of(name), Buffer(3, 0.2, 0.6)), seed=3)


@pytest.mark.parametrize("length", [3, 8])
def test_a_buffer_of_one_is_decoding_block_by_block(model, length):
    rule = rule_of("threshold", {"threshold": 0.05})
    result = expected(model, prompt_of(length), Method(rule, Buffer(1, 0.0, 0.0)))
    tokens, forwards = uncached(model, prompt_of(length), 19, 4, rule)
    np.testing.assert_array_equal(result.tokens, tokens)
    assert result.forwards["denoise"] == forwards


def test_blocks_that_have_to_fill_take_as_many_forwards_as_one_of_them(model):
    one_by_one = rule_of("threshold", {"threshold": 1.0})
    for blocks, forwards in ((1, 20), (2, 12), (5, 8)):  # each joins one forward after the one before
        result = expected(model, prompt_of(4), Method(one_by_one, Buffer(blocks, 0.0, 0.0)))
        assert result.forwards["denoise"] == forwards
    waits = expected(model, prompt_of(4), Method(one_by_one, Buffer(2, 0.0, 1.0)))
    assert waits.forwards["denoise"] == 20  # nobody has to fill before the block in front is done


def test_a_block_joins_and_has_to_fill_from_its_share_on():
    buffer = Buffer(3, add_at=0.5, force_at=0.75)
    assert not buffer.wants_more([0.25]) and buffer.wants_more([0.0, 0.5])
    assert not buffer.wants_more([0.9, 0.9, 0.9]) and Buffer(0).wants_more([0.9] * 9)
    assert buffer.must_fill([0.5, 0.75, 0.0]) == [True, False, True]


@pytest.mark.parametrize("name", sorted(name for name in RULES if name != "indel" and "remdm" not in name))
def test_a_rule_that_is_sure_of_nothing_leaves_a_block_that_need_not_fill(name):
    rule, V, m = rule_of(name), 40, 4
    seen = Seen(
        np.full(m, MASK),
        np.zeros(m, bool),
        np.ones(m, bool),
        choice_m=np.arange(m),
        probability_m=np.full(m, 0.03),
        entropy_m=np.full(m, 3.5),
        logits_mV=np.zeros((m, V), np.float32),
        verified_m=np.ones(m),
        mask_token_id=MASK,
    )
    assert rule.step(seen, None).changes(seen)
    change = rule.step(replace(seen, must_fill=False), None)
    assert not change.changes(seen) and not change.is_done


def test_no_block_begins_behind_an_end_and_the_text_ends_there(model):
    method = Method(rule_of("threshold", {"threshold": 0.05}), Buffer(0, 0.0, 0.0))
    whole = expected(model, prompt_of(9), method)
    place = next(n for n in range(2, 12) if whole.tokens[n] not in whole.tokens[:n])
    limits = Limits(new_tokens=60, end_tokens=[int(whole.tokens[place])])
    (result,) = decoder(model, method).results([prompt_of(9)], limits)
    assert result.stop is Stop.end and result.tokens[-1] == whole.tokens[place]
    stops = [
        event.first + len(event.tokens)
        for event in decoder(model, method).run([prompt_of(9)], limits)
        if isinstance(event, BlockChanged) and limits.end_tokens[0] in event.tokens[~event.is_masked]
    ]
    assert stops and len(set(stops[1:])) <= 1  # in the forward after, none more


def begun(new_tokens=19, **limits):
    limits = Limits(new_tokens=new_tokens, **limits)
    return Running(0, Prompt(prompt_of(4)), limits, block_size=4, mask_token_id=MASK, context=CONTEXT)


def test_a_block_joins_unless_an_end_stands_in_those_before_it():
    running = begun(end_tokens=[7])
    running.tokens[5] = 7
    running.advance(Buffer(0, 0.0, 0.0))
    assert len(running.anchor.blocks) == 1
    running.tokens[5] = 8
    running.advance(Buffer(0, 0.0, 0.0))
    assert len(running.anchor.blocks) == 2


LOOKAHEAD = {
    "one": Lookahead(1),
    "three": Lookahead(3),
    "entropy": Lookahead(3, by_entropy=True),
    "lowest": Lookahead(2, lowest=0.5, memory=0.3),
}


@pytest.mark.parametrize("name", few(LOOKAHEAD, "three"))
@pytest.mark.parametrize("blocks", [1, 3])
def test_branches_in_one_forward_are_as_many_forwards_of_one(model, name, blocks):
    method = Method(rule_of("threshold", {"threshold": 0.05}), Buffer(blocks, 0.2, 0.6), LOOKAHEAD[name])
    assert_as_without_a_cache(model, method)
    if name == "three":
        ours = assert_as_without_a_cache(model, method, max_cached_tokens=100, batch=4)
        assert ours.counts.put_back


@pytest.mark.parametrize("rule", few(sorted(n for n in RULES if not rule_of(n).edits), "credit"))
def test_every_rule_that_fills_serves_branches(model, rule):
    assert_as_without_a_cache(model, Method(rule_of(rule), lookahead=Lookahead(2)), seed=1)


def test_branches_take_fewer_forwards_and_other_tokens(model):
    """A branch adds a token that the rule would have waited for."""
    rule = rule_of("threshold", {"threshold": 1.0})
    plain, ahead = (
        expected(model, prompt_of(9), Method(rule, lookahead=Lookahead(k)), block_size=32) for k in (0, 3)
    )
    assert ahead.forwards["denoise"] < plain.forwards["denoise"] == 19 + 4
    assert (ahead.tokens != plain.tokens).any()


def test_the_branch_that_is_surest_of_its_masks_wins():
    lookahead = Lookahead(2, lowest=0.5, memory=0.25)
    assert lookahead.confidence(np.array([0.9, 0.1, 0.3, 0.8]), 0.6) == pytest.approx(0.25 * 0.6 + 0.75 * 0.2)
    assert Lookahead(2).confidence(np.zeros(0), 0.2) == 1.0
    anchor = Branch(np.full(4, MASK), [])
    first, second = lookahead.spawned(
        anchor, np.array([0, 2, 3]), np.array([7, 8, 9]), np.array([0.1, 0.5, 0.5])
    )
    assert first.tokens.tolist() == [MASK, MASK, 8, MASK] and first.confidence == 0.5
    assert second.tokens.tolist() == [MASK, MASK, MASK, 9] and anchor.tokens.tolist() == [MASK] * 4


def test_the_branch_that_won_is_an_anchor_like_any_other():
    running = begun()
    running.lookahead = [running.anchor.with_token(5, 9, 0.3)]
    sure, unsure = np.array([[1.0, 0.9]] * 3), np.array([[1.0, 0.1]] * 4)
    method = Method(rule_of("threshold", {"threshold": 1.0}), lookahead=Lookahead(1, memory=0.5))
    changed, kept = running.step(method, [sure, unsure], seed=0)
    assert changed.tokens.tolist() == [1, 9, MASK, MASK] and kept == 4
    assert running.anchor.confidence == 1.0 and running.decided_at[4:8].tolist() == [1, 1, 0, 0]
    (ahead,) = running.lookahead
    assert ahead.tokens[4:8].tolist() == [1, 9, 1, MASK] and ahead.confidence == 0.9


def test_branches_take_room_of_their_own(model):
    method = Method(RULE, lookahead=Lookahead(3))
    limits = Limits(new_tokens=15)
    decoder(model, method, max_cached_tokens=36).check(0, prompt_of(9), limits)
    with pytest.raises(BadInput, match="takes 36 cached tokens"):
        decoder(model, method, max_cached_tokens=32).check(0, prompt_of(9), limits)


def test_a_method_is_its_rule_with_other_defaults():
    assert method_of("threshold") == Method(rule_of("threshold"))
    assert method_of("d2f") == Method(rule_of("threshold", {"threshold": 0.9}), Buffer(0, 0.1, 0.95))
    asked = method_of("lopa", {"branches": "5", "threshold": "0.8", "branch_entropy": "true"})
    assert asked == Method(rule_of("threshold", {"threshold": 0.8}), Buffer(), Lookahead(5, by_entropy=True))
    assert all(method_of(name).rule == rule_of(*METHODS[name][:1], _of_rule(name)) for name in METHODS)


def _of_rule(name):
    return {key: value for key, value in METHODS[name][1].items() if key == "threshold"}


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("best", {}, "There is no rule 'best': give threshold, "),
        ("lopa", {"steps": "3"}, "Rule lopa has no setting steps: give threshold, "),
        ("multibd", {"buffer": "-1"}, "blocks"),
        ("multibd", {"add_at": "2"}, "add_at"),
        ("lopa", {"branch_lowest": "0"}, "lowest"),
    ],
)
def test_what_is_no_method_is_one_sentence(name, given, said):
    with pytest.raises(BadInput, match=said):
        method_of(name, given)


@pytest.mark.parametrize(
    ("rule", "branches", "said"),
    [
        ("threshold", 5, "5 lookahead branches are more than the 4 tokens of a block"),
        ("joint", 2, "need a rule that fills masks and leaves other tokens alone"),
    ],
)
def test_branches_that_cannot_be_are_one_sentence(model, rule, branches, said):
    with pytest.raises(BadInput, match=said):
        decoder(model, Method(rule_of(rule), lookahead=Lookahead(branches)))


def decoded(overrides: list[str]) -> list[list[int]]:
    config = settings(*overrides)
    groups.initialize(config.layout)
    method = Method(rule_of("threshold", {"threshold": 0.05}), Buffer(2, 0.2, 0.6), Lookahead(3))
    results = decoder(tiny(config), method, max_cached_tokens=400).results(
        [prompt_of(length) for length in LENGTHS[:2]], Limits(new_tokens=14)
    )
    return [result.tokens.tolist() for result in results]


@pytest.mark.parametrize(
    ("processes", "axes"),
    [
        (2, "bp=2"),
        pytest.param(4, "bp=4", marks=pytest.mark.slow),
        pytest.param(4, "bp=2 tp=2 ep=4", marks=pytest.mark.slow),
        pytest.param(4, "bp=2", marks=pytest.mark.slow),
    ],
)
def test_branches_on_several_ranks_are_those_of_one_process(processes, axes):
    overrides = [f"layout.{axis}" for axis in [*axes.split(), f"processes={processes}", "global_batch=4"]]
    (alone,) = run_ranks(decoded, ["layout.global_batch=4"])
    assert run_ranks(decoded, overrides, processes=processes) == [alone] * processes


def refused(overrides: list[str]) -> str:
    try:
        decoded(overrides)
    except BadInput as fault:
        return str(fault)
    return ""


@pytest.mark.slow
def test_branches_that_do_not_divide_the_ranks_are_one_sentence():
    overrides = ["layout.bp=3", "layout.processes=3", "layout.global_batch=3"]
    said = run_ranks(refused, overrides, processes=3)
    assert all(each == said[0] and "are no multiple of layout.bp=3 ranks: ask for 5" in each for each in said)
