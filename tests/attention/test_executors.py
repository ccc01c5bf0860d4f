"""Every executor against the dense reference, for whole masks and for rectangles of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.attention import BlockDiffusionMask, Rectangle, block_diffusion_attention
from llada_megatron.attention.registry import executor_names

VIEWS = [(True, False), (False, False), (False, True)]  # clean_copy, causal


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def one_document(length, samples=1):
    return [torch.tensor([0, length])] * samples


def random_qkv(mask, heads=2, kv_heads=1, head_dim=4, dtype=torch.float64):
    rectangle = mask.whole() if isinstance(mask, BlockDiffusionMask) else mask

    def draw(length, tensor_heads):
        shape = length, rectangle.batch, tensor_heads, head_dim
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    queries, keys = rectangle.queries, rectangle.keys
    return draw(queries, heads), draw(keys, kv_heads), draw(keys, kv_heads)


def output_and_gradients(qkv, mask, backend):
    output = block_diffusion_attention(*qkv, mask, backend)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad(output, qkv, weight)]


def grouped(mask, share_of_cuts, random):
    """The same mask with noise groups that begin at some of its blocks and at every document."""
    place = np.arange(mask.length)
    begins = (mask.block_start == place) & (random.random(mask.block_start.shape) < share_of_cuts)
    begins |= mask.document_start == place
    return replace(mask, group_starts=np.maximum.accumulate(np.where(begins, place, 0), axis=1))


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
    mask = BlockDiffusionMask(cu_seqlens, block_size, grid, *draw(st.sampled_from(VIEWS)))
    if not mask.clean_copy or draw(st.booleans()):
        return mask
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return grouped(mask, draw(st.sampled_from([0.0, 0.3, 0.6])), random)


@st.composite
def rectangles(draw):
    """Queries of some blocks, the last of them perhaps cut short; a halo of other noisy keys; padding."""
    mask = draw(masks())
    everything = np.arange(mask.length)
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share_of_blocks = draw(st.sampled_from([0.1, 0.5, 0.9]))
    share_of_halo = draw(st.sampled_from([0.0, 0.1, 0.6])) if mask.clean_copy else 0.0
    tokens = []
    for start in mask.block_start:
        chosen = random.random(mask.length) < share_of_blocks
        chosen[random.integers(mask.length)] = True
        tokens.append(everything[np.isin(start, start[chosen])])
    count = min(map(len, tokens))
    tokens = [of_sample[:count] for of_sample in tokens]
    noisy_keys = []
    for of_sample, start in zip(tokens, mask.group_start, strict=True):
        needed = np.isin(start, start[of_sample])
        noisy_keys.append(everything[needed | (random.random(mask.length) < share_of_halo)])
    most = max(map(len, noisy_keys)) + draw(st.integers(0, 3))
    if not mask.clean_copy:
        noisy_keys, most = [everything[:0]] * mask.batch, 0
    padded = [np.append(keys, [mask.length] * (most - len(keys))).astype(int) for keys in noisy_keys]
    return Rectangle(mask, np.stack(tokens), np.stack(padded))


def assert_equals_reference(backend, mask, qkv, tolerance):
    expected = output_and_gradients(qkv, mask, "reference")
    for got, want in zip(output_and_gradients(qkv, mask, backend), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


EXECUTORS = executor_names(torch.device("cpu"), torch.float32, 64)
OTHERS = [name for name in EXECUTORS if name != "reference"]
TOLERANCES = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]


@settings(max_examples=150)
@given(mask=masks(), kv_heads=st.integers(1, 3), group=st.integers(1, 3))
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("backend", OTHERS)
def test_executor_equals_reference_in_output_and_gradients(backend, dtype, tolerance, mask, kv_heads, group):
    qkv = random_qkv(mask, kv_heads * group, kv_heads, dtype=dtype)
    assert_equals_reference(backend, mask, qkv, tolerance)


@settings(max_examples=150)
@given(rectangle=rectangles(), kv_heads=st.integers(1, 2), group=st.integers(1, 3))
@pytest.mark.parametrize("backend", OTHERS)
def test_executor_equals_reference_on_rectangles_with_gaps_halo_and_padding(
    backend, rectangle, kv_heads, group
):
    qkv = random_qkv(rectangle, kv_heads * group, kv_heads)
    assert_equals_reference(backend, rectangle, qkv, 1e-10)


@pytest.mark.parametrize("block_size", [1, 4, 32, 100, 256, 700])
@pytest.mark.parametrize("grid", ["sequence", "document"])
@pytest.mark.parametrize("backend", OTHERS)
def test_executor_equals_reference_where_documents_fill_several_segments(backend, grid, block_size):
    samples = [torch.tensor([0, 1100, 1150, 1250]), torch.tensor([0, 30, 60, 1200, 1250])]
    mask, heads = BlockDiffusionMask(samples, block_size, grid), 1
    if block_size in (4, 100):
        mask, heads = grouped(mask, 0.5, np.random.default_rng(0)), 2
    assert_equals_reference(
        backend, mask, random_qkv(mask, heads, 1), 1e-12 if mask.group_starts is not None else 1e-10
    )


@pytest.mark.parametrize("backend", EXECUTORS)
def test_groups_of_one_block_are_computed_bit_for_bit_as_blocks(backend):
    mask = BlockDiffusionMask([torch.tensor([0, 70, 150]), torch.tensor([0, 150])], 4)
    qkv = random_qkv(mask, dtype=torch.float32)
    found = output_and_gradients(qkv, grouped(mask, 1.0, np.random.default_rng(0)), backend)
    assert all(map(torch.equal, found, output_and_gradients(qkv, mask, backend)))


@pytest.mark.parametrize("backend", EXECUTORS)
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


@pytest.mark.parametrize("backend", EXECUTORS)
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
    for backend in EXECUTORS:
        grouped = block_diffusion_attention(query, key, value, mask, backend)
        torch.testing.assert_close(grouped, block_diffusion_attention(query, *repeated, mask, backend))


@pytest.mark.parametrize("backend", EXECUTORS)
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


@pytest.mark.parametrize("backend", EXECUTORS)
def test_bfloat16_stays_bfloat16_and_close_to_float64(backend):
    mask = BlockDiffusionMask(one_document(150, samples=2), 4)
    exact_qkv = random_qkv(mask)
    bfloat16_qkv = [tensor.detach().bfloat16().requires_grad_() for tensor in exact_qkv]
    exact = output_and_gradients(exact_qkv, mask, "reference")
    for got, want in zip(output_and_gradients(bfloat16_qkv, mask, backend), exact, strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), want, rtol=0.05, atol=0.05)


def test_portable_works_in_any_memory_layout():
    mask = BlockDiffusionMask(one_document(70, samples=2), 4)
    mixed = torch.randn(mask.total, 2, 4, 3 * 8, dtype=torch.float64, requires_grad=True)
    qkv = mixed.split(8, dim=-1)
    results = [
        torch.autograd.grad(block_diffusion_attention(*qkv, mask, b).sin().sum(), mixed, retain_graph=True)
        for b in ("portable", "reference")
    ]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", EXECUTORS)
def test_a_nan_reaches_every_row_that_sees_it_and_no_other_sample(backend):
    mask = BlockDiffusionMask([torch.tensor([0, 70, 150]), torch.tensor([0, 150])], 4)
    for place, position in ((0, 160), (1, 155), (2, 3)):
        qkv = [tensor.detach() for tensor in random_qkv(mask)]
        qkv[place][position, 0] = torch.nan
        output = block_diffusion_attention(*qkv, mask, backend)
        is_nan = output.isnan().any(dim=-1).any(dim=-1)  # [S, B]
        sees = mask.dense()[:, position] if place else torch.arange(mask.total) == position
        assert is_nan[sees, 0].all() and not is_nan[:, 1].any()


@pytest.mark.parametrize("backend", EXECUTORS)
def test_a_nan_gradient_is_not_hidden(backend):
    mask = BlockDiffusionMask(one_document(150), 4)
    qkv = random_qkv(mask)
    weight = torch.ones_like(qkv[0])
    weight[200] = torch.nan
    output = block_diffusion_attention(*qkv, mask, backend)
    gradients = torch.autograd.grad(output, qkv, weight)
    assert gradients[0][200].isnan().all() and gradients[2][150:200].isnan().all()


@pytest.mark.parametrize(
    "query_shape, key_shape, value_shape, message",
    [
        ((23, 2, 4, 8), (24, 2, 2, 8), (24, 2, 2, 8), r"query must be \[24, 2, .*got \(23, 2, 4, 8\)"),
        ((24, 1, 4, 8), (24, 2, 2, 8), (24, 2, 2, 8), r"query must be \[24, 2, .*got \(24, 1, 4, 8\)"),
        ((24, 2, 32), (24, 2, 2, 8), (24, 2, 2, 8), r"query must be .*got \(24, 2, 32\)"),
        ((24, 2, 4, 8), (12, 2, 2, 8), (12, 2, 2, 8), r"key must be .*got \(12, 2, 2, 8\)"),
        ((24, 2, 4, 8), (24, 2, 2, 16), (24, 2, 2, 16), r"key must be .*got \(24, 2, 2, 16\)"),
        (
            (24, 2, 4, 8),
            (24, 2, 2, 8),
            (24, 2, 1, 8),
            r"value must be \[24, 2, 2, value_dim\] .* got \(24, 2, 1, 8\)",
        ),
        ((24, 2, 4, 8), (24, 2, 3, 8), (24, 2, 3, 8), "4 query heads must be a multiple of the 3 key"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_by_value(query_shape, key_shape, value_shape, message):
    mask = BlockDiffusionMask(one_document(12, samples=2), 4)
    with pytest.raises(ValueError, match=message):
        block_diffusion_attention(*map(torch.zeros, (query_shape, key_shape, value_shape)), mask)
