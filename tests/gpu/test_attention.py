"""Every executor of block-diffusion attention on a CUDA device against the dense reference in float64.

`make test-gpu` ends with a table for docs/results/attention.md.
"""

from collections import defaultdict
from importlib.metadata import version

import numpy as np
import pytest
import torch

from llada_megatron.attention import (
    BlockDiffusionMask,
    block_diffusion_attention,
    cudnn_flex,
    select_backend,
)
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from tests.attention.test_executors import grouped

pytestmark = pytest.mark.gpu

DEVICE, DTYPE, HEAD_DIM = "cuda", torch.bfloat16, 128
EXECUTORS = ["cudnn_flex", "flex_torch", "cudnn_graph", "portable"]
LENGTH = 2048  # L
DOCUMENTS = {
    "one": [[0, LENGTH]],
    "packed": [[0, 1, 700, 831, LENGTH], [0, 1024, LENGTH]],  # other documents in each sample
    "many short": [[*range(0, LENGTH, 100), LENGTH]],
}
BLOCK_SIZES = [1, 4, 32, 256, 1024, LENGTH]
HEADS = [(8, 2), (8, 1)]  # the ratios of LLaDA2.0-mini and -flash
TOLERANCE = 0.02
"""Norm of the difference over norm of the reference: a few roundings to bfloat16 (0.002 each)."""


@pytest.fixture(params=EXECUTORS)
def executor(request):
    try:
        select_backend(request.param, torch.device(DEVICE), DTYPE, HEAD_DIM)
    except BadInput as refusal:
        pytest.skip(str(refusal))
    torch.compiler.reset()  # FlexAttention counts recompilations, and these are many shapes
    return request.param


@pytest.fixture(scope="module")
def table(request):
    """Errors by (executor, mask, documents); their table is printed when the module's tests are done."""
    errors_of: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    yield errors_of
    header = "executor", "mask", "documents", "cases", "output", "dq", "dk", "dv"
    rows = [header, ("---",) * len(header)]
    for name, cases in sorted(errors_of.items()):
        worst = (f"{max(errors):.1e}" for errors in zip(*cases, strict=True))
        rows.append((*name, str(len(cases)), *worst))
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n\n{device_name()}, torch {torch.__version__}, cuDNN frontend {frontend_version()}")
        print("Largest relative error, norm of the difference over norm of the float64 reference:\n")
        print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n")


def device_name():
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"


def frontend_version():
    return version(cudnn_flex.PACKAGE) if cudnn_flex.installed_version() else "not installed"


def block_mask(documents, block_size, **view):
    cu_seqlens = [torch.tensor(boundaries) for boundaries in DOCUMENTS[documents]]
    return BlockDiffusionMask(cu_seqlens, block_size, **view)


def draw(rectangle, heads=8, kv_heads=2):
    """Query, key, value and the gradient of the output, in DTYPE."""
    torch.manual_seed(0)
    shapes = [(rectangle.queries, heads), (rectangle.keys, kv_heads), (rectangle.keys, kv_heads)]
    shapes.append(shapes[0])
    return [
        torch.randn(tokens, rectangle.batch, n, HEAD_DIM, device=DEVICE, dtype=DTYPE) for tokens, n in shapes
    ]


def output_and_gradients(rectangle, tensors, executor):
    *inputs, gradient = tensors
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = block_diffusion_attention(*inputs, rectangle, executor)
    return [output.detach(), *torch.autograd.grad(output, inputs, gradient)]


def errors(rectangle, executor, heads=8, kv_heads=2):
    tensors = draw(rectangle, heads, kv_heads)
    got = output_and_gradients(rectangle, tensors, executor)
    exact = output_and_gradients(rectangle, [tensor.double() for tensor in tensors], "reference")
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]


def check(table, executor, mask, documents, rectangle, heads=8, kv_heads=2):
    found = errors(rectangle, executor, heads, kv_heads)
    table[executor, mask, documents].append(found)
    assert max(found) < TOLERANCE


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_output_and_gradients_equal_the_reference(table, executor, documents, block_size, heads, kv_heads):
    rectangle = block_mask(documents, block_size).whole()
    check(table, executor, "[x_t ; x_0]", documents, rectangle, heads, kv_heads)


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("name, block_size, causal", [("MDLM", LENGTH, False), ("AR", 1, True)])
def test_masks_without_a_clean_copy_equal_the_reference(table, executor, documents, name, block_size, causal):
    mask = block_mask(documents, block_size, clean_copy=False, causal=causal)
    check(table, executor, name, documents, mask.whole())


@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("share_of_cuts", [0.0, 0.5])
def test_noise_groups_equal_the_reference(table, executor, documents, share_of_cuts):
    mask = grouped(block_mask(documents, 32), share_of_cuts, np.random.default_rng(0))
    check(table, executor, "noise groups", documents, mask.whole())


@pytest.mark.parametrize("block_size", [4, 1024])  # blocks of 1024 span ranks: a halo, and padding
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_rectangles_of_context_parallelism_equal_the_reference(table, executor, documents, ranks, block_size):
    mask = block_mask(documents, block_size, block_grid="document")
    for rank in range(ranks):
        rectangle = ContextShard(mask, rank, ranks).rectangle
        check(table, executor, "context parallel", documents, rectangle)


@pytest.mark.parametrize("block_size", [1, 32, 300])
def test_a_hidden_key_changes_nothing_and_a_visible_one_does(executor, block_size):
    mask = block_mask("packed", block_size)
    rectangle = mask.whole()
    query, key, value, _ = draw(rectangle)
    before = block_diffusion_attention(query, key, value, rectangle, executor)
    for position in (0, 1, 699, 700, LENGTH - 1, LENGTH, LENGTH + 830, 2 * LENGTH - 1):
        changed = value.clone()
        changed[position] += 1000
        after = block_diffusion_attention(query, key, changed, rectangle, executor)
        rows_that_changed = (after != before).flatten(2).any(dim=2).cpu()  # [S, B]
        for sample in range(mask.batch):
            assert torch.equal(rows_that_changed[:, sample], mask.dense(sample)[:, position])


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_two_deterministic_runs_agree_bitwise(executor, documents):
    rectangle = block_mask(documents, 32).whole()
    tensors = draw(rectangle)
    were_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if executor == "cudnn_graph" and torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("cuDNN's graphs have a deterministic backward on sm_90 alone")
        first, second = (output_and_gradients(rectangle, tensors, executor) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(were_deterministic)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_gradient_of_a_plain_sum_is_served(executor):
    rectangle = block_mask("one", 32).whole()
    *inputs, gradient = draw(rectangle)
    *_, expected = output_and_gradients(rectangle, [*inputs, torch.ones_like(gradient)], executor)
    value = inputs[2].requires_grad_()
    block_diffusion_attention(*inputs, rectangle, executor).sum().backward()
    torch.testing.assert_close(value.grad, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("executor", ["cudnn_flex"], indirect=True)
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_log_sum_exp_equals_the_reference(executor, documents):
    rectangle = block_mask(documents, 32).whole()
    query, key, value, _ = draw(rectangle)
    _, lse = cudnn_flex.attention_and_lse(query, key, value, rectangle, softmax_scale=0.1)
    visible = torch.stack([rectangle.dense(sample) for sample in range(rectangle.batch)]).to(DEVICE)
    repeated = key.double().repeat_interleave(query.size(2) // key.size(2), dim=2)
    scores = torch.einsum("qbhd,kbhd->bhqk", query.double(), repeated) * 0.1
    exact = scores.masked_fill(~visible[:, None], float("-inf")).logsumexp(dim=-1)  # [B, H, Q]
    torch.testing.assert_close(lse.double(), exact.permute(2, 0, 1), rtol=1e-3, atol=1e-3)
