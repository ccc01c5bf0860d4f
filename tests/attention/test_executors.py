"""Every executor against the dense reference, and the composed one against its promised work and memory."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, composed
from llada_megatron.attention.composed import performed_pairs

VIEWS = [(True, False), (False, False), (False, True)]  # clean_copy, causal


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_document(length, samples=1):
    return [torch.tensor([0, length])] * samples


def random_qkv(mask, heads=2, kv_heads=1, head_dim=4, dtype=torch.float64):
    def draw(tensor_heads):
        shape = mask.total, mask.batch, tensor_heads, head_dim
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    return draw(heads), draw(kv_heads), draw(kv_heads)


def output_and_gradients(qkv, mask, backend):
    output = block_diffusion_attention(*qkv, mask, backend)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, qkv, weight)]


@st.composite
def masks(draw, max_length=180):
    """Micro-batches of one or two samples, alike or not, on both sides of the chunk length."""
    length = draw(st.integers(1, max_length))
    inner_boundaries = st.sets(st.integers(1, length - 1), max_size=6) if length > 1 else st.just(set())
    samples = draw(st.lists(inner_boundaries, min_size=1, max_size=2))
    samples = samples * draw(st.integers(1, 2)) if len(samples) == 1 else samples
    block_size = draw(
        st.integers(1, length) | st.sampled_from([b for b in (1, 4, 32, length) if b <= length])
    )
    grid = draw(st.sampled_from(["sequence", "document"]))
    cu_seqlens = [torch.tensor([0, *sorted(inner), length]) for inner in samples]
    return BlockDiffusionMask(cu_seqlens, block_size, grid, *draw(st.sampled_from(VIEWS)))


@settings(max_examples=150)
@given(mask=masks(), kv_heads=st.integers(1, 3), group=st.integers(1, 3))
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_composed_equals_reference_in_output_and_gradients(dtype, tolerance, mask, kv_heads, group):
    qkv = random_qkv(mask, kv_heads * group, kv_heads, dtype=dtype)
    expected = output_and_gradients(qkv, mask, "reference")
    for got, want in zip(output_and_gradients(qkv, mask, "composed"), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_a_hidden_key_changes_nothing_and_a_visible_one_does(backend):
    mask = BlockDiffusionMask([torch.tensor([0, 23, 41]), torch.tensor([0, 10, 41])], 4)
    query, key, value = (tensor.detach() for tensor in random_qkv(mask))
    before = block_diffusion_attention(query, key, value, mask, backend)
    for position in (0, 22, 30, 41, 60, 81):
        changed_value = value.clone()
        changed_value[position] += 1
        after = block_diffusion_attention(query, key, changed_value, mask, backend)
        rows_that_changed = ((after - before).abs() > 1e-12).any(dim=-1).any(dim=-1)  # [S, B]
        for sample in range(2):
            assert torch.equal(rows_that_changed[:, sample], mask.dense(sample)[:, position])


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_changing_document_a_leaves_document_b_unchanged(backend):
    mask = BlockDiffusionMask([torch.tensor([0, 37, 90])], 8)
    document_b = torch.cat([torch.arange(37, 90), torch.arange(127, 180)])
    qkv = [tensor.detach() for tensor in random_qkv(mask)]
    changed = [tensor.clone() for tensor in qkv]
    for tensor in changed:
        tensor[:37] += 3
        tensor[90:127] += 3
    before, after = (block_diffusion_attention(*tensors, mask, backend) for tensors in (qkv, changed))
    assert torch.equal(before[document_b], after[document_b])


def test_grouped_query_heads_use_neighbouring_key_heads():
    mask = BlockDiffusionMask(one_document(20), 4)
    query, key, value = (tensor.detach() for tensor in random_qkv(mask, heads=6, kv_heads=2))
    repeated = [tensor.repeat_interleave(3, dim=2) for tensor in (key, value)]
    for backend in ("reference", "composed"):
        grouped = block_diffusion_attention(query, key, value, mask, backend)
        torch.testing.assert_close(grouped, block_diffusion_attention(query, *repeated, mask, backend))


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_softmax_scale_multiplies_the_scores_and_defaults_to_inverse_root_head_dim(backend):
    mask = BlockDiffusionMask(one_document(20), 4)
    query, key, value = random_qkv(mask, head_dim=16)
    default = block_diffusion_attention(query, key, value, mask, backend)
    torch.testing.assert_close(
        default, block_diffusion_attention(query, key, value, mask, backend, softmax_scale=0.25)
    )
    torch.testing.assert_close(
        block_diffusion_attention(query * 3, key, value, mask, backend),
        block_diffusion_attention(query, key, value, mask, backend, softmax_scale=0.75),
    )


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_bfloat16_stays_bfloat16_and_close_to_float64(backend):
    mask = BlockDiffusionMask(one_document(150, samples=2), 4)
    exact_qkv = random_qkv(mask)
    bfloat16_qkv = [tensor.detach().bfloat16().requires_grad_() for tensor in exact_qkv]
    exact = output_and_gradients(exact_qkv, mask, "reference")
    for got, want in zip(output_and_gradients(bfloat16_qkv, mask, backend), exact, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


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
    for got, want in zip(key_and_value_gradients("composed", torch.bfloat16), exact, strict=True):
        error = (got - want)[seen_by_every_call].norm() / want[seen_by_every_call].norm()
        assert error < 0.004  # one rounding is 2^-9; adding up in bfloat16 gives 0.006


def test_composed_works_in_any_memory_layout():
    mask = BlockDiffusionMask(one_document(70, samples=2), 4)
    mixed = torch.randn(mask.total, 2, 4, 3 * 8, dtype=torch.float64, requires_grad=True)
    qkv = mixed.split(8, dim=-1)
    results = [
        torch.autograd.grad(block_diffusion_attention(*qkv, mask, b).sin().sum(), mixed, retain_graph=True)
        for b in ("composed", "reference")
    ]
    torch.testing.assert_close(*results)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("block_size", [1, 4, 48, 512, 1024])
@pytest.mark.parametrize("boundaries", [[0, 1024], [0, 300, 1024]])
def test_composed_allocates_nothing_quadratic(boundaries, block_size):
    mask = BlockDiffusionMask([torch.tensor(boundaries), torch.tensor([0, 1024])], block_size)
    qkv = random_qkv(mask, head_dim=8)
    with LargestTensor() as largest:
        output_and_gradients(qkv, mask, "composed")
    largest_input = qkv[0].numel()
    mask_of_a_chunk = composed.MIN_CHUNK_TOKENS * 2 * mask.length
    assert largest.elements <= max(largest_input, mask_of_a_chunk) < mask.total**2 / 16


def test_reference_is_quadratic_as_the_recorder_must_see():
    mask = BlockDiffusionMask(one_document(256), 4)
    with LargestTensor() as largest:
        output_and_gradients(random_qkv(mask), mask, "reference")
    assert largest.elements >= mask.total**2


def test_memory_of_masks_and_copied_keys_grows_linearly():
    def held(length):
        plan = composed._plans_of(
            BlockDiffusionMask(one_document(length), 4).whole(), torch.device("cpu"), torch.float32
        )[0]
        masks = {
            call.bias.untyped_storage().data_ptr(): call.bias.untyped_storage().nbytes()
            for call in plan
            if call.bias is not None
        }
        return len(masks), sum(stop - start for call in plan for start, stop in call.keys)

    (few, keys), (as_few, more_keys) = held(1024), held(4096)
    assert few == as_few <= 4
    assert more_keys <= 4.1 * keys


def test_the_plan_is_made_once_per_rectangle(monkeypatch):
    made = []
    make_plan = composed._plan
    monkeypatch.setattr(composed, "_plan", lambda *arguments: made.append(1) or make_plan(*arguments))
    mask = BlockDiffusionMask(one_document(100, samples=3), 4)
    qkv, rectangle = random_qkv(mask), mask.whole()
    for _layer in range(3):
        block_diffusion_attention(*qkv, rectangle)
    assert len(made) == 1  # samples with the same documents share it too
    block_diffusion_attention(*qkv, replace(mask, block_size=5))
    assert len(made) == 2


def test_maskless_views_perform_exactly_the_visible_pairs():
    documents = [torch.tensor([0, 300, 512]), torch.tensor([0, 512])]
    for mask in (
        BlockDiffusionMask(documents, 512, clean_copy=False),
        BlockDiffusionMask(documents, 1, clean_copy=False, causal=True),
        BlockDiffusionMask(documents, 512),
        BlockDiffusionMask(documents, 128, "document"),
    ):
        assert performed_pairs(mask) == mask.visible_pairs()
        plans = composed._plans_of(mask.whole(), torch.device("cpu"), torch.float32)
        assert all(call.bias is None for plan in plans for call in plan)


def test_one_document_without_clean_copy_is_one_call():
    mdlm = BlockDiffusionMask(one_document(2048), 32, clean_copy=False)
    autoregressive = BlockDiffusionMask(one_document(2048), 1, clean_copy=False, causal=True)
    for mask, is_causal in ((mdlm, False), (autoregressive, True)):
        [[call]] = composed._plans_of(mask.whole(), torch.device("cpu"), torch.float32)
        assert (call.query, call.bias, call.is_causal) == ((0, 2048), None, is_causal)


@given(mask=masks())
def test_performed_pairs_are_at_least_the_visible_ones(mask):
    assert mask.visible_pairs() <= performed_pairs(mask) <= mask.batch * mask.total**2


def test_composed_performs_few_pairs_that_are_hidden():
    mask = BlockDiffusionMask(one_document(1024, samples=2), 4)
    assert performed_pairs(mask) < 1.15 * mask.visible_pairs()


@pytest.mark.parametrize(
    "query_shape, key_shape, value_shape, message",
    [
        ((23, 2, 4, 8), (24, 2, 2, 8), (24, 2, 2, 8), r"query must be \[24, 2, .*got \(23, 2, 4, 8\)"),
        ((24, 1, 4, 8), (24, 2, 2, 8), (24, 2, 2, 8), r"query must be \[24, 2, .*got \(24, 1, 4, 8\)"),
        ((24, 2, 32), (24, 2, 2, 8), (24, 2, 2, 8), r"query must be .*got \(24, 2, 32\)"),
        ((24, 2, 4, 8), (12, 2, 2, 8), (12, 2, 2, 8), r"key must be .*got \(12, 2, 2, 8\)"),
        ((24, 2, 4, 8), (24, 2, 2, 16), (24, 2, 2, 16), r"key must be .*got \(24, 2, 2, 16\)"),
        ((24, 2, 4, 8), (24, 2, 2, 8), (24, 2, 1, 8), r"value must .*\(24, 2, 2, 8\), got \(24, 2, 1, 8\)"),
        ((24, 2, 4, 8), (24, 2, 3, 8), (24, 2, 3, 8), "4 query heads must be a multiple of the 3 key"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_value(query_shape, key_shape, value_shape, message):
    mask = BlockDiffusionMask(one_document(12, samples=2), 4)
    with pytest.raises(ValueError, match=message):
        block_diffusion_attention(*map(torch.zeros, (query_shape, key_shape, value_shape)), mask)
