"""Both kernels against plain autograd, and what merging relies on."""

import pytest
import torch

from llada_megatron.attention import kernels
from llada_megatron.attention.kernels import CpuKernel, PlainKernel

KERNELS = [CpuKernel(), PlainKernel()]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiles(dtype=torch.float64, tiles=3, heads=2, queries=21, keys=13, head_dim=8):
    """query, key, value and the gradient of the output, as views of [T, m, H, D]."""
    lengths = queries, keys, keys, queries
    drawn = [torch.randn(tiles, length, heads, head_dim, dtype=dtype) for length in lengths]
    return [tensor.transpose(1, 2) for tensor in drawn]


def bias_of(shape, dtype=torch.float64):
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return torch.zeros(shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min / 2)


def scores_of(query, key, bias):
    scores = query @ key.mT * 0.3
    return scores if bias is None else scores + bias


BIASES = [None, (1, 1, 21, 13), (3, 1, 21, 13), (3, 1, 1, 13)]


@pytest.mark.parametrize("bias_shape", BIASES)
@pytest.mark.parametrize("max_scores", [1 << 24, 200])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_kernel_equals_autograd(monkeypatch, kernel, max_scores, bias_shape):
    monkeypatch.setattr(kernels, "MAX_SCORES", max_scores)
    query, key, value, grad = tiles()
    bias = None if bias_shape is None else bias_of(bias_shape)
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    scores = scores_of(*inputs[:2], bias)
    expected = scores.softmax(dim=-1) @ inputs[2]
    out, lse = kernel.forward(query, key, value, bias, 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, scores.logsumexp(dim=-1))
    gradients = kernel.backward(grad, query, key, value, out, lse, bias, 0.3)
    for got, want in zip(gradients, torch.autograd.grad(expected, inputs, grad), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_gradients_of_parts_of_the_keys_add_up_given_the_whole_output(kernel):
    query, key, value, grad = tiles()
    out, lse = kernel.forward(query, key, value, None, 0.3)
    whole = kernel.backward(grad, query, key, value, out, lse, None, 0.3)
    first, second = (
        kernel.backward(grad, query, key[:, :, part], value[:, :, part], out, lse, None, 0.3)
        for part in (slice(0, 5), slice(5, None))
    )
    torch.testing.assert_close(first[0] + second[0], whole[0])
    for place in (1, 2):
        torch.testing.assert_close(torch.cat([first[place], second[place]], dim=2), whole[place])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_a_row_with_infinite_log_sum_exp_contributes_nothing(kernel):
    query, key, value, grad = tiles()
    out, lse = kernel.forward(query, key, value, None, 0.3)
    masked_grad = grad.clone()
    masked_grad[:, :, 7] = 0
    without = kernel.backward(masked_grad, query, key, value, out, lse, None, 0.3)
    lse[:, :, 7] = torch.inf
    for got, want in zip(kernel.backward(grad, query, key, value, out, lse, None, 0.3), without, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype_and_a_wide_log_sum_exp(kernel, dtype):
    query, key, value, grad = tiles(dtype)
    out, lse = kernel.forward(query, key, value, None, 0.3)
    gradients = kernel.backward(grad, query, key, value, out, lse, None, 0.3)
    assert lse.dtype == torch.float32 and {tensor.dtype for tensor in (out, *gradients)} == {dtype}
    exact = scores_of(query.double(), key.double(), None)
    torch.testing.assert_close(lse.double(), exact.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), exact.softmax(dim=-1) @ value.double(), rtol=0.02, atol=0.02)


def test_the_plain_kernel_holds_few_scores_at_a_time(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SCORES", 200)
    query, key, *_ = tiles()
    steps = [step.stop - step.start for step in kernels._row_chunks(query, key)]
    assert max(steps) * 3 * 2 * 13 <= 200
