"""Embeddings between a token and the mask: by hand, whole tokens to the bit, and split over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.model.gpt import BlockDiffusionGPT
from llada_megatron.model.inputs import ModelInputs, SoftTokens
from llada_megatron.model.readout import LOGITS
from llada_megatron.parallel import groups
from tests.distributed import run_ranks
from tests.generate.models import MASK, settings, tiny

# isort: split
from megatron.core.utils import get_attr_wrapped_model  # after the seam of the imports above

S = 8
TOKENS = torch.tensor([[3, 7, MASK, 9, 7, 400, MASK, 1]])
WEIGHTS = torch.tensor([[1.0, 0.3, 1.0, 0.0, 0.85, 0.999, 0.4, 1.0]])


def inputs(soft: SoftTokens | None) -> ModelInputs:
    mask = BlockDiffusionMask([torch.tensor([0, S])], 4, clean_copy=False, causal=True)
    rows = torch.arange(S)
    return ModelInputs(TOKENS, rows[None], ContextShard(mask), rows, readout=LOGITS, soft=soft)


@torch.no_grad()
def read(model: Any, soft: SoftTokens | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first layer reads, [S/tp, H], and the logits of all rows, [S, V]."""
    seen: list[torch.Tensor] = []
    handle = get_attr_wrapped_model(model, "decoder").register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    try:
        logits = model(inputs(soft))
    finally:
        handle.remove()
    return seen[0][:, 0], logits


@pytest.fixture(scope="module")
def model() -> Iterator[BlockDiffusionGPT]:
    groups.initialize(LayoutConfig())
    try:
        yield tiny(settings())
    finally:
        groups.destroy()


def test_a_row_is_the_mean_of_token_and_mask_at_the_mean_of_their_norms(model):
    table = model.embedding.word_embeddings.weight.detach().double()
    found, _ = read(model, SoftTokens(WEIGHTS, MASK))
    for row, token, weight in zip(found, TOKENS[0], WEIGHTS[0].double(), strict=True):
        mixed = weight * table[token] + (1 - weight) * table[MASK]
        norm = weight * table[token].norm() + (1 - weight) * table[MASK].norm()
        torch.testing.assert_close(row.double(), mixed / mixed.norm() * norm, rtol=1e-5, atol=1e-6)
    assert (found[1] - table[7]).abs().max() > 0.01


def test_whole_tokens_are_read_to_the_bit_whatever_the_others_are(model):
    hard, expected = read(model, None)
    whole, logits = read(model, SoftTokens(torch.ones(1, S), MASK))
    assert torch.equal(whole, hard) and torch.equal(logits, expected)
    mixed, _ = read(model, SoftTokens(WEIGHTS, MASK))
    is_whole = WEIGHTS[0] == 1
    assert torch.equal(mixed[is_whole], hard[is_whole])
    assert SoftTokens.of(torch.ones(S).numpy(), MASK, torch.device("cpu")) is None


def test_bf16_mixes_in_fp32(model):
    half = tiny(settings("precision=bf16"))
    found, _ = read(half, SoftTokens(WEIGHTS, MASK))
    table = get_attr_wrapped_model(half, "embedding").word_embeddings.weight.detach().double()
    mixed = 0.3 * table[7] + 0.7 * table[MASK]
    expected = mixed / mixed.norm() * (0.3 * table[7].norm() + 0.7 * table[MASK].norm())
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found[1].double(), expected, rtol=2**-8, atol=0)


def embedded(overrides: list[str]) -> Any:
    """What the first layer reads of each row on this rank, and the logits."""
    config = settings("layout.global_batch=4", *overrides)
    torch.set_num_threads(1)
    groups.initialize(config.layout)
    model = tiny(config)
    found, logits = read(model, SoftTokens(WEIGHTS, MASK))
    return found.tolist(), logits.tolist()


@pytest.mark.slow
def test_split_over_ranks_every_row_is_read_as_by_one():
    ((expected, logits),) = run_ranks(embedded, [])
    found = run_ranks(embedded, ["layout.processes=2", "layout.tp=2"], processes=2)
    rows = [row for part, _ in found for row in part]
    assert [len(part) for part, _ in found] == [S // 2] * 2  # sequence parallelism
    torch.testing.assert_close(torch.tensor(rows), torch.tensor(expected))
    for _, of_rank in found:
        torch.testing.assert_close(torch.tensor(of_rank), torch.tensor(logits), rtol=1e-4, atol=1e-4)
