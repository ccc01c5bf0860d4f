"""How `cudnn.flex_attention` is called, against a stand-in that computes densely on the CPU.

The stand-in follows the package's documentation: BSHD tensors, endpoints [1, F, B Q] of each sample's own
keys, no implicit copies. `make gpu-compile` holds the same call against the package itself.
"""

import gc
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings

from llada_megatron.attention import BlockDiffusionMask, Rectangle, block_diffusion_attention, cudnn_flex
from tests.attention.test_intervals import rectangles


class StandIn(ModuleType):
    """`cudnn.flex_attention`, dense; remembers its plans and calls."""

    def __init__(self):
        super().__init__("cudnn.flex_attention")
        self.plans, self.calls = [], []

    def create_mask_plan(self, mask_func, query, key, value, *, build_backward):
        assert mask_func.dtype == torch.int32 and mask_func.is_contiguous()
        batch, queries, keys = *query.shape[:2], key.shape[1]
        assert mask_func.shape == (1, mask_func.shape[1], batch * queries)
        ends = mask_func[0].view(-1, batch, queries, 1)
        position = torch.arange(keys)
        visible = position < ends[0]
        for start, stop in zip(ends[1::2], ends[2::2], strict=True):
            visible = visible | ((position >= start) & (position < stop))
        self.plans.append(SimpleNamespace(visible=visible, build_backward=build_backward))
        return self.plans[-1]

    def flex_attn_func(self, query, key, value, *, mask_plan, softmax_scale, deterministic, return_lse):
        needs_backward = torch.is_grad_enabled() and query.requires_grad
        assert mask_plan.build_backward or not needs_backward
        self.calls.append(SimpleNamespace(plan=mask_plan, deterministic=deterministic))
        group = query.size(2) // key.size(2)
        key, value = (tensor.repeat_interleave(group, dim=2) for tensor in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * softmax_scale
        scores = scores.masked_fill(~mask_plan.visible[:, None], float("-inf"))
        output = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value).contiguous()
        if needs_backward:
            output.register_hook(refuse_expanded)
        assert return_lse
        return output, scores.logsumexp(dim=-1)


def refuse_expanded(gradient):
    assert gradient.stride(-1) == 1, "implicit copies are not supported"


@pytest.fixture(scope="module")
def package():
    stand_in = StandIn()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cudnn", ModuleType("cudnn"))
        patch.setitem(sys.modules, "cudnn.flex_attention", stand_in)
        yield stand_in


@pytest.fixture(autouse=True)
def fresh(package):
    package.plans.clear()
    package.calls.clear()


def draw_qkv(rectangle, heads=4, kv_heads=2):
    torch.manual_seed(0)
    shapes = [(rectangle.queries, heads), (rectangle.keys, kv_heads), (rectangle.keys, kv_heads)]
    return [
        torch.randn(tokens, rectangle.batch, n, 8, dtype=torch.float64, requires_grad=True)
        for tokens, n in shapes
    ]


def small_rectangle():
    return BlockDiffusionMask([torch.tensor([0, 5, 12]), torch.tensor([0, 12])], 4).whole()


@settings(max_examples=60)
@given(rectangle=rectangles(max_length=40))
def test_output_and_gradients_equal_the_reference(package, rectangle):
    qkv = draw_qkv(rectangle)
    got = cudnn_flex.cudnn_flex_attention(*qkv, rectangle, 0.3)
    expected = block_diffusion_attention(*qkv, rectangle, "reference", softmax_scale=0.3)
    torch.testing.assert_close(got, expected)
    gradients = (torch.autograd.grad(output.sum(), qkv) for output in (got, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_log_sum_exp_is_that_of_each_rows_visible_scores(package):
    rectangle = small_rectangle()
    query, key, value = draw_qkv(rectangle, heads=2, kv_heads=2)
    _, lse = cudnn_flex.attention_and_lse(query, key, value, rectangle, 0.3)
    scores = torch.einsum("qbhd,kbhd->qbhk", query, key) * 0.3
    visible = torch.stack([rectangle.dense(sample) for sample in range(2)], dim=1)  # [Q, B, K]
    expected = scores.masked_fill(~visible[:, :, None], float("-inf")).logsumexp(dim=-1)
    torch.testing.assert_close(lse, expected)


def test_layers_share_a_plan_and_other_documents_get_their_own(package):
    rectangle, held_before = small_rectangle(), len(cudnn_flex._plans)
    for _layer in range(3):
        cudnn_flex.cudnn_flex_attention(*draw_qkv(rectangle), rectangle, 1.0)
    assert len(package.plans) == 1
    other = BlockDiffusionMask([torch.tensor([0, 7, 12]), torch.tensor([0, 12])], 4).whole()
    cudnn_flex.cudnn_flex_attention(*draw_qkv(other), other, 1.0)
    assert [call.plan for call in package.calls] == [package.plans[0]] * 3 + [package.plans[1]]
    del rectangle, other
    gc.collect()
    assert len(cudnn_flex._plans) <= held_before


def test_one_plan_serves_a_forward_without_gradients_and_its_recomputation(package):
    rectangle = small_rectangle()
    qkv = draw_qkv(rectangle)
    with torch.no_grad():
        cudnn_flex.cudnn_flex_attention(*qkv, rectangle, 1.0)
    cudnn_flex.cudnn_flex_attention(*qkv, rectangle, 1.0).sum().backward()
    assert [plan.build_backward for plan in package.plans] == [True]


def test_decoding_gets_no_tables_for_a_backward(package):
    whole = small_rectangle()
    few = Rectangle(whole.mask, whole.tokens, whole.noisy_keys, few_rows=True)
    with torch.no_grad():
        cudnn_flex.cudnn_flex_attention(*draw_qkv(few), few, 1.0)
    assert [plan.build_backward for plan in package.plans] == [False]


def test_the_backward_is_deterministic_when_torch_is_asked_to_be(package):
    rectangle = small_rectangle()
    before = torch.are_deterministic_algorithms_enabled()
    try:
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            cudnn_flex.cudnn_flex_attention(*draw_qkv(rectangle), rectangle, 1.0)
    finally:
        torch.use_deterministic_algorithms(before)
    assert [call.deterministic for call in package.calls] == [False, True]
