"""WINO's draft and verify: a shadow under a dense mask; no cache, batch or buffer changes a token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask, Rectangle
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.generate import Limits, Prompt
from llada_megatron.generate.branches import Lookahead
from llada_megatron.generate.buffer import Buffer
from llada_megatron.generate.decoder import Decoder
from llada_megatron.generate.full import CACHES, FullAttention, FullDecoder
from llada_megatron.generate.methods import Method
from llada_megatron.generate.reference_loop import Canvas, recomputed, reference_loop, shadow
from llada_megatron.generate.rules import Figures, rule_of
from llada_megatron.generate.running import Running
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.parallel import groups
from tests.distributed import run_ranks
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny

RULE = rule_of("wino", {"threshold": 0.03, "verify_threshold": 0.05})
LENGTHS = (17, 2, 40, 9)
LIMITS = Limits(new_tokens=27)
BLOCK = 8


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(settings())
    finally:
        groups.destroy()


@dataclass(frozen=True, eq=False)
class Dense(Rectangle):
    """Any mask, for the executor `reference`; the keys are those of the rows."""

    visible: torch.Tensor | None = None

    def dense(self, sample=0):
        return self.visible

    rectangle = property(lambda self: self)

    def of(self, key, value, layer, group):
        return key, value


@pytest.mark.parametrize("is_full", [False, True], ids=["blocks", "full"])
def test_a_shadow_reads_everything_but_the_tokens_that_it_shadows(model, is_full):
    """By one dense mask over the sequence and the shadow behind it."""
    tokens = np.append(prompt_of(14), [MASK, 7, MASK, 9, 11, MASK])
    start, stop, S, m = 8, 16, 20, 8
    reach = S if is_full else stop
    canvas = Canvas(tokens, BLOCK, MASK, full_from=8 if is_full else None)
    rows = np.array([9, 13, 15])
    found = shadow(model, canvas, slice(start, stop), rows, Figures.logits)
    row = torch.arange(reach)
    visible = torch.zeros(reach + m, reach + m, dtype=torch.bool)
    visible[:reach, :reach] = True if is_full else row[:, None] // BLOCK >= row // BLOCK
    visible[reach:] = True
    visible[torch.arange(reach, reach + m), torch.arange(start, stop)] = False
    mask = BlockDiffusionMask([torch.tensor([0, reach + m])], reach + m, clean_copy=False)
    everything = np.arange(reach + m)[None]
    inputs = ModelInputs(
        tokens=torch.from_numpy(np.append(tokens[:reach], np.full(m, MASK)))[None],
        positions=torch.from_numpy(np.append(np.arange(reach), np.arange(start, stop)))[None],
        keys=Dense(mask, everything, everything[:, :0], visible=visible),
        outputs=torch.from_numpy(reach + rows - start),
        readout=Figures.logits.readout(MASK),
    )
    attentions = [each for each in model.modules() if hasattr(each, "backend")]
    before = [each.backend for each in attentions]
    for each in attentions:
        each.backend = "reference"
    try:
        with torch.no_grad():
            expected = model(inputs).numpy()
    finally:
        for each, backend in zip(attentions, before, strict=True):
            each.backend = backend
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    changed = replace(canvas, tokens=np.where(np.arange(S) == 9, 33, tokens))
    assert not np.allclose(shadow(model, changed, slice(start, stop), rows, Figures.logits)[1:], found[1:])


def decoder(model, buffer=Buffer(), rule=RULE, **options):  # noqa: B008
    whole = {"block_size": BLOCK, "mask_token_id": MASK, "context": CONTEXT, "batch": 2} | options
    return Decoder(model, rule, buffer=buffer, **whole)


def assert_as_without_a_cache(model, buffer, rule=RULE, seed=0, lengths=LENGTHS, **options):
    """Returns the decoder, and how many tokens were masked again."""
    ours, again = decoder(model, buffer, rule, seed=seed, **options), 0
    results = ours.results([prompt_of(length) for length in lengths], LIMITS)
    for number, (length, result) in enumerate(zip(lengths, results, strict=True)):
        prompt = Prompt(prompt_of(length))
        running = Running(number, prompt, LIMITS, block_size=BLOCK, mask_token_id=MASK, context=CONTEXT)
        expected = recomputed(model, running, Method(rule, buffer), seed)
        np.testing.assert_array_equal(result.tokens, expected.tokens)
        np.testing.assert_array_equal(result.decided_at, expected.decided_at)
        assert result.forwards["denoise"] == expected.forwards["denoise"]
        again += int(result.is_edited.sum())
    assert ours.pages.available == ours.pages.count
    return ours, again


def test_the_cache_changes_nothing_and_tokens_are_masked_again(model):
    _, again = assert_as_without_a_cache(model, Buffer(), lengths=LENGTHS[:2])
    assert again > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "buffer", [Buffer(), Buffer(2, 0.1, 0.5), Buffer(0, 0.3, 0.95)], ids="{0.blocks}".format
)
@pytest.mark.parametrize("drawing", [{}, {"temperature": 0.5}, {"random_order": True}], ids=str)
def test_a_buffer_and_draws_change_nothing_either(model, buffer, drawing):
    rule = rule_of("wino", {"threshold": 0.03, "verify_threshold": 0.05} | drawing)
    room = 104 if buffer.blocks else 152  # the longest takes 144 by itself with all its blocks active
    ours, again = assert_as_without_a_cache(model, buffer, rule, seed=3, max_cached_tokens=room, batch=4)
    assert ours.counts.put_back and again


def test_a_sequence_with_its_shadow_fits_the_room_or_is_refused(model):
    limits = Limits(new_tokens=15)
    decoder(model, max_cached_tokens=32).check(0, prompt_of(9), limits)
    with pytest.raises(BadInput, match="takes 32 cached tokens"):
        decoder(model, max_cached_tokens=24).check(0, prompt_of(9), limits)


def test_branches_are_refused(model):
    with pytest.raises(BadInput, match="need a rule that fills masks and leaves other tokens alone"):
        decoder(model, lookahead=Lookahead(1))


def full_decoder(model, rule=RULE, **options):
    return FullDecoder(model, rule, block_size=BLOCK, mask_token_id=MASK, context=CONTEXT, **options)


def test_where_every_position_sees_every_other_it_is_the_plain_loop(model):
    (result,) = full_decoder(model).results([prompt_of(9)], LIMITS)
    canvas = Canvas(np.append(prompt_of(9), np.full(27, MASK)), BLOCK, MASK, full_from=9)
    expected, forwards = reference_loop(model, canvas, RULE)
    np.testing.assert_array_equal(result.tokens, expected[9:])
    assert result.forwards["denoise"] == forwards and result.is_edited.any()


@pytest.mark.slow
@pytest.mark.parametrize("full", [CACHES["dual"], FullAttention(before=4, after=4, cfg_scale=0.7)], ids=str)
def test_no_batch_or_bound_changes_a_token_of_a_full_attention_model(model, full):
    prompts = [prompt_of(length) for length in LENGTHS]
    alone = [full_decoder(model, full=full).results([prompt], LIMITS)[0].tokens for prompt in prompts]
    ours = full_decoder(model, full=full, batch=4, max_cached_tokens=160 * full.copies)
    for result, expected in zip(ours.results(prompts, LIMITS), alone, strict=True):
        np.testing.assert_array_equal(result.tokens, expected)
    assert ours.pages.available == ours.pages.count


def decoded(overrides: list[str]) -> list[list[int]]:
    config = settings(*overrides)
    groups.initialize(config.layout)
    results = decoder(tiny(config)).results([prompt_of(length) for length in LENGTHS[:2]], LIMITS)
    return [result.tokens.tolist() for result in results]


@pytest.mark.slow
def test_every_layout_gives_the_tokens_of_one_process():
    overrides = ["layout.tp=2", "layout.ep=2", "layout.processes=2", "layout.global_batch=4"]
    (alone,) = run_ranks(decoded, ["layout.global_batch=4"])
    assert run_ranks(decoded, overrides, processes=2) == [alone] * 2
