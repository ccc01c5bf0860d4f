"""What the portable executor promises beyond its results: its work, its memory, its plans."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, kernels, portable
from llada_megatron.attention.tiles import performed_pairs
from tests.attention.test_executors import masks, one_document, output_and_gradients, random_qkv


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_key_gradients_of_many_calls_are_rounded_to_bfloat16_once():
    mask = BlockDiffusionMask(one_document(1024), 4)
    qkv = [tensor.detach().bfloat16() for tensor in random_qkv(mask, heads=1, head_dim=16)]
    weight = torch.rand(mask.total, 1, 1, 16, dtype=torch.float64)

    def key_and_value_gradients(backend, dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in qkv]
        output = block_diffusion_attention(*inputs, mask, backend)
        return torch.autograd.grad(output, inputs[1:], weight.to(dtype))

    exact = key_and_value_gradients("reference", torch.float64)
    seen_by_every_call = slice(1024, 1088)
    for got, want in zip(key_and_value_gradients("portable", torch.bfloat16), exact, strict=True):
        error = (got - want)[seen_by_every_call].norm() / want[seen_by_every_call].norm()
        assert error < 0.0027  # every call rounds once too; adding up in bfloat16 gives 0.003


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


VIEWS_AND_BLOCKS = [
    *((True, False, block_size) for block_size in (1, 4, 48, 512, 2048)),
    (False, False, 2048),
    (False, True, 1),
    (False, True, 32),
]


@pytest.mark.parametrize("clean_copy, causal, block_size", VIEWS_AND_BLOCKS)
@pytest.mark.parametrize("boundaries", [[0, 2048], [0, 600, 2048]])
def test_nothing_quadratic_is_allocated(boundaries, clean_copy, causal, block_size):
    samples = [torch.tensor(boundaries), torch.tensor([0, 2048])]
    mask = BlockDiffusionMask(samples, block_size, clean_copy=clean_copy, causal=causal)
    qkv = random_qkv(mask, heads=2, kv_heads=2, head_dim=8)
    with LargestTensor() as largest:
        output_and_gradients(qkv, mask, "portable")
    most_hidden_pairs_of_a_token = 2 * 64
    assert largest.elements <= max(qkv[0].numel(), most_hidden_pairs_of_a_token * 2 * 2048)
    assert largest.elements < mask.total**2 / 7


def test_reference_is_quadratic_as_the_recorder_must_see():
    mask = BlockDiffusionMask(one_document(256), 4)
    with LargestTensor() as largest:
        output_and_gradients(random_qkv(mask), mask, "reference")
    assert largest.elements >= mask.total**2


@pytest.mark.slow
def test_sixteen_thousand_tokens_need_no_large_tensor():
    mask = BlockDiffusionMask(one_document(16384), 4)
    qkv = random_qkv(mask, heads=1, head_dim=16, dtype=torch.float32)
    with LargestTensor() as largest:
        output_and_gradients(qkv, mask, "portable")
    assert largest.elements <= qkv[0].numel()


def tensors_of(value):
    """Every tensor inside a plan."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list):
        return [tensor for item in value for tensor in tensors_of(item)]
    attributes = vars(value).values() if hasattr(value, "__dict__") else []
    return [tensor for attribute in attributes for tensor in tensors_of(attribute)]


@pytest.mark.parametrize("block_size", [1, 4, 100, 512])
@pytest.mark.parametrize("grid", ["sequence", "document"])
def test_a_plan_grows_linearly(grid, block_size):
    def held(length):
        documents = torch.tensor([*range(0, length, 300), length])
        rectangle = BlockDiffusionMask([documents], block_size, grid).whole()
        plan = portable._plan(rectangle, torch.device("cpu"), torch.float32, 2)
        return sum(tensor.nbytes for tensor in tensors_of(plan))

    assert 0 < held(16384) <= 1.25 * 8 * held(2048)


def test_a_plan_is_made_once_per_rectangle_device_dtype_and_group(monkeypatch):
    made = []
    make_plan = portable._plan
    monkeypatch.setattr(portable, "_plan", lambda *arguments: made.append(1) or make_plan(*arguments))
    mask = BlockDiffusionMask(one_document(100, samples=3), 4)
    qkv, rectangle = random_qkv(mask), mask.whole()
    for _layer in range(3):
        output_and_gradients(qkv, rectangle, "portable")
    assert len(made) == 1
    block_diffusion_attention(*(tensor.float() for tensor in qkv), rectangle, "portable")
    assert len(made) == 2
    block_diffusion_attention(*random_qkv(mask, heads=3, kv_heads=1), rectangle, "portable")
    assert len(made) == 3
    block_diffusion_attention(*qkv, replace(mask, block_size=5), "portable")
    assert len(made) == 4


def test_long_blocks_and_documents_perform_exactly_the_visible_pairs():
    documents = [torch.tensor([0, 300, 512]), torch.tensor([0, 512])]
    for mask in (
        BlockDiffusionMask(documents, 512, clean_copy=False),
        BlockDiffusionMask(documents, 512),
        BlockDiffusionMask(documents, 128, "document"),
    ):
        assert performed_pairs(mask) == mask.visible_pairs()


@given(mask=masks())
def test_performed_pairs_are_at_least_the_visible_ones(mask):
    assert mask.visible_pairs() <= performed_pairs(mask)


def test_few_hidden_pairs_are_performed():
    for block_size in (1, 4, 32, 256):
        mask = BlockDiffusionMask(one_document(2048, samples=2), block_size)
        assert performed_pairs(mask) < 1.1 * mask.visible_pairs()
    packed = BlockDiffusionMask([torch.tensor([0, 900, 1000, 1010, 2048])], 4)
    assert performed_pairs(packed) < 1.25 * packed.visible_pairs()


@pytest.mark.parametrize(
    "samples", [one_document(150, 2), [torch.tensor([0, 70, 150]), torch.tensor([0, 150])]]
)
def test_the_plain_kernel_gives_the_same_results(monkeypatch, samples):
    mask = BlockDiffusionMask(samples, 4)
    qkv = random_qkv(mask, heads=4, kv_heads=2)
    expected = output_and_gradients(qkv, mask, "portable")
    monkeypatch.setattr(portable, "kernel_for", lambda device: kernels.PlainKernel())
    for got, want in zip(output_and_gradients(qkv, mask, "portable"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_recomputation_gives_the_same_gradients():
    mask = BlockDiffusionMask([torch.tensor([0, 70, 150])], 4)
    qkv, rectangle = random_qkv(mask), mask.whole()
    direct = block_diffusion_attention(*qkv, rectangle, "portable")
    again = torch.utils.checkpoint.checkpoint(
        block_diffusion_attention, *qkv, rectangle, "portable", use_reentrant=False
    )
    gradients = [torch.autograd.grad(output.square().sum(), qkv) for output in (direct, again)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
