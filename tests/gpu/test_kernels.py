"""What can go wrong with a kernel besides its numbers: strides, memory, streams, compiling. `make test-gpu`.

Fixtures and inputs are those of test_attention.py.
"""

import gc

import numpy as np
import pytest
import torch

from llada_megatron.attention import block_diffusion_attention
from llada_megatron.attention.context import ContextShard
from tests.gpu.test_attention import (
    DEVICE,
    DTYPE,
    HEAD_DIM,
    TOLERANCE,
    block_mask,
    draw,
    errors,
    executor,
    output_and_gradients,
)

__all__ = ["executor"]

pytestmark = pytest.mark.gpu

HEADS, KV_HEADS = 8, 2


def test_views_of_one_projection_are_served_like_copies(executor):
    """As layers have them: query, key and value are columns of one tensor [S, B, (H + 2 Hkv) D]."""
    rectangle = block_mask("packed", 32).whole()
    torch.manual_seed(0)
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    shape = rectangle.queries, rectangle.batch, width
    mixed = torch.randn(shape, device=DEVICE, dtype=DTYPE, requires_grad=True)
    parts = mixed.unflatten(2, (-1, HEAD_DIM)).split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    assert not any(part.is_contiguous() for part in parts)
    output = block_diffusion_attention(*parts, rectangle, executor)
    gradient = torch.randn_like(output)
    (found,) = torch.autograd.grad(output, mixed, gradient)
    copies = [part.detach().contiguous() for part in parts]
    expected, *gradients = output_and_gradients(rectangle, [*copies, gradient], executor)
    torch.testing.assert_close(output.detach(), expected, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(found, torch.cat(gradients, dim=2).flatten(2), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("documents", ["packed", "many short"])
def test_no_element_is_left_as_it_was_in_memory(executor, documents, monkeypatch):
    """Keys that nobody sees and rows of padding included: memory that is taken holds NaN first."""
    if executor == "cudnn_graph" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN's graphs have a deterministic backward on sm_90 alone")
    rectangle = ContextShard(block_mask(documents, 1024, block_grid="document"), 1, 4).rectangle
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    were_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert max(errors(rectangle, executor)) < TOLERANCE  # NaN is below nothing
    finally:
        torch.use_deterministic_algorithms(were_deterministic)


def test_memory_of_a_mask_goes_with_it(executor):
    def used() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def once(seed: int) -> None:
        ends = np.sort(np.random.default_rng(seed).choice(np.arange(1, 2048), 7, replace=False))
        boundaries = [torch.tensor([0, *ends, 2048])] * 2
        rectangle = type(block_mask("one", 32))(boundaries, 32).whole()
        output_and_gradients(rectangle, draw(rectangle), executor)

    once(0)  # what a process keeps: kernels, workspaces
    before = used()
    for seed in range(1, 5):
        once(seed)
    assert used() <= before


def test_another_stream_gives_the_same(executor):
    """Plans are made on the stream that is current, and the kernels run on it."""
    documents = block_mask("packed", 32)
    tensors = draw(documents.whole())
    expected = output_and_gradients(documents.whole(), tensors, executor)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = output_and_gradients(documents.whole(), tensors, executor)
        torch.cuda.current_stream().synchronize()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("executor", ["cudnn_flex"], indirect=True)
def test_neither_another_mask_nor_another_length_compiles_again(executor):
    from cudnn.flex_attention import dispatch

    caches = [dispatch._flex_attn_fwd.compile_cache, dispatch._flex_attn_bwd.compile_cache]
    compiled = []
    for documents, block_size, clean_copy in (
        ("one", 32, True),
        ("packed", 4, True),
        ("many short", 256, True),
    ):
        rectangle = block_mask(documents, block_size, clean_copy=clean_copy).whole()
        output_and_gradients(rectangle, draw(rectangle), executor)
        shard = ContextShard(block_mask(documents, block_size, block_grid="document"), 0, 2).rectangle
        output_and_gradients(shard, draw(shard), executor)
        compiled.append([len(cache) for cache in caches])
    assert compiled == [compiled[0]] * len(compiled)


@pytest.mark.parametrize("executor", ["flex_torch"], indirect=True)
def test_the_masks_of_a_run_stay_compiled(executor):
    """Past the limit of recompilations it raises."""
    for documents in ("one", "packed"):
        for view in ({}, {"clean_copy": False}, {"clean_copy": False, "causal": True}):
            mask = block_mask(documents, 32 if view != {"clean_copy": False} else 2048, **view)
            shards = [] if view else [ContextShard(mask, rank, 2).rectangle for rank in range(2)]
            for rectangle in (mask.whole(), *shards):
                tensors = draw(rectangle)
                output_and_gradients(rectangle, tensors, executor)
                with torch.no_grad():
                    block_diffusion_attention(*tensors[:3], rectangle, executor)
