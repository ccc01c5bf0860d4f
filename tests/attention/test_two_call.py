"""The merge of two calls and its backward, with plain float64 products for calls, against the reference."""

import gc

import pytest
import torch
from hypothesis import given, settings

from llada_megatron.attention import BlockDiffusionMask, two_call
from llada_megatron.attention.two_call import HIDDEN_SCORE, TwoCalls, two_call_attention
from tests.attention.test_executors import output_and_gradients, random_qkv, rectangles


class PlainCall:
    """Softmax over one sequence of keys for sequences [B, Q] and [B, K], hidden scores finite."""

    def __init__(self, visible_of, sequences_of):
        self.visible_of, self.sequences_of = visible_of, sequences_of

    def forward(self, query, key, value, seen, scale):
        q, k, v = map(self.sequences_of, (query, key, value))
        scores = self.scores(q, k, seen, scale)
        lse = scores.logsumexp(dim=-1)  # [B, H, Q]
        out = torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), self.repeated(v, q))
        return self.back(out, query), self.back(lse.transpose(1, 2), query)

    def backward(self, grad_out, query, key, value, out, lse, seen, scale):
        grad, q, k, v, o, lse = map(self.sequences_of, (grad_out, query, key, value, out, lse))
        k, v = self.repeated(k, q), self.repeated(v, q)
        weights = (self.scores(q, k, seen, scale) - lse.transpose(1, 2)[..., None]).exp()
        row_sum = (grad * o).sum(dim=-1).transpose(1, 2)[..., None]
        grad_scores = weights * (torch.einsum("bqhd,bkhd->bhqk", grad, v) - row_sum) * scale
        gradients = (
            torch.einsum("bhqk,bkhd->bqhd", grad_scores, k),
            *(
                torch.einsum("bhqk,bqhd->bkhd", *pair).unflatten(2, (key.size(-2), -1)).sum(dim=3)
                for pair in ((grad_scores, q), (weights, grad))
            ),
        )
        return tuple(self.back(g, like) for g, like in zip(gradients, (query, key, value), strict=True))

    def scores(self, q, k, seen, scale):
        scores = torch.einsum("bqhd,bkhd->bhqk", q, self.repeated(k, q)) * scale
        # No modifier for the gradient: that of a hidden score is 0 because its weight is.
        return scores.masked_fill(~self.visible_of(seen, q.size(1), k.size(1))[:, None], HIDDEN_SCORE)

    def repeated(self, keys, query):
        return keys.repeat_interleave(query.size(2) // keys.size(2), dim=2)

    def back(self, result, like):
        return (result.transpose(0, 1) if like.dim() == 4 else result[0]).contiguous()


def seen_in_interval(seen, queries, keys):
    key = torch.arange(keys)
    return (key >= seen.start[..., None]) & (key < seen.stop[..., None])


def seen_in_own_block(seen, queries, keys):
    assert (seen.row_edges.diff() <= seen.longest).all() and (seen.key_edges.diff() <= seen.most_keys).all()
    row_block, key_block = (
        torch.repeat_interleave(edges.diff()) for edges in (seen.row_edges, seen.key_edges)
    )
    return (row_block[:, None] == key_block)[None]


PLAIN = TwoCalls(
    PlainCall(seen_in_interval, lambda tensor: tensor.transpose(0, 1)),
    PlainCall(seen_in_own_block, lambda tensor: tensor[None]),
)


def assert_equals_reference(qkv, rectangle):
    expected = output_and_gradients(qkv, rectangle, "reference")
    output = two_call_attention(*qkv, rectangle, qkv[0].size(-1) ** -0.5, PLAIN)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    got = [output, *torch.autograd.grad(output, qkv, weight)]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@settings(max_examples=150)
@given(rectangle=rectangles())
def test_output_and_gradients_equal_the_reference_on_any_rectangle(rectangle):
    torch.manual_seed(0)
    assert_equals_reference(random_qkv(rectangle, heads=4, kv_heads=2), rectangle)


@pytest.mark.parametrize("grid", ["sequence", "document"])
@pytest.mark.parametrize("block_size", [1, 4, 60])
def test_rows_of_a_first_block_see_no_clean_key_and_equal_the_reference(grid, block_size):
    mask = BlockDiffusionMask([torch.tensor([0, 1, 33, 60]), torch.tensor([0, 60])], block_size, grid)
    rectangle = mask.whole()
    plan = two_call.plan_of(rectangle, torch.device("cpu"))
    assert (plan.seen.start == plan.seen.stop).any()
    torch.manual_seed(0)
    assert_equals_reference(random_qkv(rectangle), rectangle)


def test_a_large_score_of_a_hidden_key_changes_nothing():
    rectangle = BlockDiffusionMask([torch.tensor([0, 20, 40])], 4).whole()
    torch.manual_seed(0)
    query, key, value = (tensor.detach() for tensor in random_qkv(rectangle))
    before = two_call_attention(query, key, value, rectangle, 1.0, PLAIN)
    key[rectangle.mask.length + 39] *= 1e4  # a clean key of the last block of the last document
    after = two_call_attention(query, key, value, rectangle, 1.0, PLAIN)
    seen = rectangle.dense()[:, rectangle.mask.length + 39]
    torch.testing.assert_close(before[~seen], after[~seen], rtol=0, atol=0)
    assert not torch.allclose(before[seen], after[seen])


def test_few_numbers_of_blocks_occur_however_documents_are_cut():
    counts = set()
    for block_size in (1, 4, 32, 1024):
        for documents in ([0, 8192], [0, 1, 700, 831, 8192], [*range(0, 8192, 100), 8192]):
            mask = BlockDiffusionMask([torch.tensor(documents)], block_size, "document")
            blocks = two_call.plan_of(mask.whole(), torch.device("cpu")).blocks
            assert blocks.row_edges[-1] == 8192 and (blocks.row_edges.diff() >= 0).all()
            counts.add((block_size, len(blocks.row_edges) - 1))
    assert len(counts) <= 9


def test_layers_share_a_plan_which_is_freed_with_the_rectangle(monkeypatch):
    made = []
    make_plan = two_call.plan_of
    monkeypatch.setattr(two_call, "plan_of", lambda *arguments: made.append(1) or make_plan(*arguments))
    rectangle, held_before = BlockDiffusionMask([torch.tensor([0, 12])], 4).whole(), len(two_call._plans)
    for _layer in range(3):
        two_call_attention(*random_qkv(rectangle), rectangle, 1.0, PLAIN)
    assert len(made) == 1
    del rectangle
    gc.collect()
    assert len(two_call._plans) <= held_before
