"""The block-diffusion mask against a definition spelled out pair by pair."""

import json
from itertools import cycle, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.config.errors import BadInput

GOLDEN = Path(__file__).parents[1] / "golden"
VIEWS = [(True, False), (False, False), (False, True)]  # clean_copy, causal
LAYOUTS = [[0, 12], [0, 5, 12], [0, 4, 8, 12], [0, 1, 2, 11, 12]]


def boundaries_of(document_lengths):
    return torch.tensor([0, *document_lengths]).cumsum(0)


def sees(query, key, boundaries, block_size, grid, clean_copy, causal):
    """The definition for one pair of positions."""
    L = boundaries[-1]
    query_token, key_token = query % L, key % L
    document = sum(start <= query_token for start in boundaries) - 1
    if not boundaries[document] <= key_token < boundaries[document + 1]:
        return False
    origin = boundaries[document] if grid == "document" else 0
    query_block, key_block = (query_token - origin) // block_size, (key_token - origin) // block_size
    if not clean_copy:
        return key_block <= query_block if causal else True
    query_is_noisy, key_is_noisy = query < L, key < L
    if query_is_noisy:
        return key_block == query_block if key_is_noisy else key_block < query_block
    return not key_is_noisy and key_block <= query_block


@pytest.mark.parametrize("clean_copy, causal", VIEWS)
@pytest.mark.parametrize("grid", ["sequence", "document"])
@pytest.mark.parametrize("block_size", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("boundaries", LAYOUTS)
def test_dense_is_the_definition_pair_by_pair(boundaries, block_size, grid, clean_copy, causal):
    mask = BlockDiffusionMask([torch.tensor(boundaries)], block_size, grid, clean_copy, causal)
    expected = [
        [sees(q, k, boundaries, block_size, grid, clean_copy, causal) for k in range(mask.total)]
        for q in range(mask.total)
    ]
    assert torch.equal(mask.dense(), torch.tensor(expected))


def group_of(token, boundaries, block_size, grid, sizes):
    """Of a token, counted over all documents, where groups of so many blocks take turns in each of them."""
    group = 0
    for start, stop in pairwise(boundaries):
        origin = start if grid == "document" else 0
        blocks = sorted({(i - origin) // block_size for i in range(start, stop)})
        turn = cycle(sizes)
        while blocks:
            size = next(turn)
            of_group, blocks = blocks[:size], blocks[size:]
            if start <= token < stop and (token - origin) // block_size in of_group:
                return group
            group += 1
    raise AssertionError


def sees_in_groups(query, key, boundaries, block_size, grid, sizes):
    """The definition for one pair of positions, with noise groups."""
    L = boundaries[-1]
    document_of_query, document_of_key = (
        sum(start <= position % L for start in boundaries) for position in (query, key)
    )
    if document_of_query != document_of_key:
        return False
    origin = boundaries[document_of_query - 1] if grid == "document" else 0
    query_block, key_block = ((position % L - origin) // block_size for position in (query, key))
    if query >= L:
        return key >= L and key_block <= query_block
    query_group, key_group = (
        group_of(position % L, boundaries, block_size, grid, sizes) for position in (query, key)
    )
    if key < L:
        return key_group == query_group and key_block <= query_block
    return key_group < query_group


def group_starts_of(boundaries, block_size, grid, sizes):
    groups = [group_of(i, boundaries, block_size, grid, sizes) for i in range(boundaries[-1])]
    return np.array([[groups.index(group) for group in groups]])


@pytest.mark.parametrize("sizes", [[1], [2], [1, 2], [3, 1], [12]], ids=str)
@pytest.mark.parametrize("grid", ["sequence", "document"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
@pytest.mark.parametrize("boundaries", LAYOUTS, ids=str)
def test_dense_with_noise_groups_is_the_definition_pair_by_pair(boundaries, block_size, grid, sizes):
    starts = group_starts_of(boundaries, block_size, grid, sizes)
    mask = BlockDiffusionMask([torch.tensor(boundaries)], block_size, grid, group_starts=starts)
    expected = [
        [sees_in_groups(q, k, boundaries, block_size, grid, sizes) for k in range(mask.total)]
        for q in range(mask.total)
    ]
    assert torch.equal(mask.dense(), torch.tensor(expected))
    alone = BlockDiffusionMask([torch.tensor(boundaries)], block_size, grid)
    assert mask.visible_pairs() == int(mask.dense().sum()) == alone.visible_pairs()
    if sizes == [1]:
        assert torch.equal(mask.dense(), alone.dense()) and (mask.group_starts == alone.block_start).all()


@given(
    document_lengths=st.lists(st.integers(1, 15), min_size=1, max_size=5),
    block_size=st.integers(1, 15),
    grid=st.sampled_from(["sequence", "document"]),
    view=st.sampled_from(VIEWS),
)
def test_visible_pairs_counts_the_dense_masks_of_the_micro_batch(document_lengths, block_size, grid, view):
    one, other = boundaries_of(document_lengths), boundaries_of(document_lengths[::-1])
    block_size = min(block_size, int(one[-1]))
    mask = BlockDiffusionMask([one, other], block_size, grid, *view)
    assert mask.visible_pairs() == sum(int(mask.dense(sample).sum()) for sample in range(2))


@given(document_lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), view=st.sampled_from(VIEWS))
def test_every_row_sees_itself(document_lengths, view):
    boundaries = boundaries_of(document_lengths)
    mask = BlockDiffusionMask([boundaries], min(3, int(boundaries[-1])), "document", *view)
    assert mask.dense().diagonal().all()


def test_ids_follow_documents_and_grid():
    cu_seqlens = [torch.tensor([0, 3, 8], dtype=torch.int32)]
    on_sequence = BlockDiffusionMask(cu_seqlens, 2, "sequence")
    on_documents = BlockDiffusionMask(cu_seqlens, 2, "document")
    assert on_sequence.document_ids(0).tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    assert on_sequence.block_ids(0).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert on_documents.block_ids(0).tolist() == [0, 0, 1, 0, 0, 1, 1, 2]
    assert on_sequence.block_ids(0).dtype == on_sequence.document_ids(0).dtype == torch.int64


def test_block_size_of_the_whole_sequence_is_mdlm_in_the_noisy_half():
    cu_seqlens = [torch.tensor([0, 5, 12])]
    dense = BlockDiffusionMask(cu_seqlens, 12).dense()
    assert torch.equal(dense[:12, :12], BlockDiffusionMask(cu_seqlens, 12, clean_copy=False).dense())
    assert not dense[:12, 12:].any()


def test_block_size_one_is_causal_in_the_clean_half():
    dense = BlockDiffusionMask([torch.tensor([0, 12])], 1).dense()
    assert torch.equal(dense[12:, 12:], torch.ones(12, 12, dtype=torch.bool).tril())


def test_last_block_may_be_short():
    dense = BlockDiffusionMask([torch.tensor([0, 12])], 5).dense()
    assert dense[10, :12].nonzero().flatten().tolist() == [10, 11]
    assert dense[10, 12:].sum() == 10


def test_clean_half_is_the_block_causal_view():
    cu_seqlens = [torch.tensor([0, 5, 12])]
    clean_half = BlockDiffusionMask(cu_seqlens, 4).dense()[12:, 12:]
    assert torch.equal(clean_half, BlockDiffusionMask(cu_seqlens, 4, clean_copy=False, causal=True).dense())


GOLDEN_CASES = json.loads((GOLDEN / "cases.json").read_text())["cases"]


@pytest.mark.parametrize("name", [name for name in GOLDEN_CASES if name != "mdlm_full"])  # it stores no mask
def test_dense_equals_the_golden_mask_of_a_case(name):
    case = GOLDEN_CASES[name]
    with safe_open(GOLDEN / "cases.safetensors", "pt") as tensors:
        allowed = tensors.get_tensor(f"{name}.attn_allowed").bool()
    clean_copy = case["kind"] == "bdlm"
    length = len(allowed) // 2 if clean_copy else len(allowed)
    mask = BlockDiffusionMask(
        [boundaries_of(case.get("doc_lens") or [length])],
        case.get("block_size") or length,
        "document" if (case.get("block_grid") or "").startswith("document") else "sequence",
        clean_copy,
        causal=case["kind"] == "block_causal",
    )
    assert torch.equal(mask.dense(), allowed)


def test_dense_equals_the_golden_mask_functions():
    with safe_open(GOLDEN / "cases.safetensors", "pt") as tensors:
        names = [name for name in tensors.keys() if name.startswith("maskfn.")]  # noqa: SIM118 - not a dict
        assert "maskfn.n12_bs5" in names
        for name in names:
            length, block_size = (int(part.lstrip("nbs")) for part in name.removeprefix("maskfn.").split("_"))
            mask = BlockDiffusionMask([torch.tensor([0, length])], block_size)
            assert torch.equal(mask.dense(), tensors.get_tensor(name).bool()), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"cu_seqlens": []}, "cu_seqlens is empty"),
        ({"cu_seqlens": [torch.tensor([0, 8, 4, 12])]}, r"cu_seqlens\[0\] must rise.*\[0, 8, 4, 12\]"),
        ({"cu_seqlens": [torch.tensor([0, 4, 4, 12])]}, r"cu_seqlens\[0\] must rise.*\[0, 4, 4, 12\]"),
        ({"cu_seqlens": [torch.tensor([2, 12])]}, r"cu_seqlens\[0\] must rise strictly from 0.*\[2, 12\]"),
        ({"cu_seqlens": [torch.tensor([0])]}, r"cu_seqlens\[0\] must rise.*\[0\]"),
        ({"cu_seqlens": [torch.tensor([0, 12]), torch.tensor([[0, 12]])]}, r"cu_seqlens\[1\].*\(1, 2\)"),
        ({"cu_seqlens": [torch.tensor([0.0, 12.0])]}, r"cu_seqlens\[0\].*float32"),
        ({"cu_seqlens": [torch.tensor([0, 12], device="meta")]}, r"cu_seqlens\[0\] is on meta"),
        ({"cu_seqlens": [torch.tensor([0, 12]), torch.tensor([0, 10])]}, r"\[12, 10\]"),
        ({"block_size": 0}, "block_size.*got 0"),
        ({"block_size": 13}, "block_size.*12 tokens, got 13"),
        ({"block_grid": "global"}, "block_grid.*'global'"),
        ({"clean_copy": True, "causal": True}, "clean_copy=False"),
        ({"clean_copy": False, "group_starts": np.zeros((1, 12), int)}, "needs clean_copy=True"),
        ({"group_starts": np.zeros((1, 8), int)}, r"must be \[1, 12\], got \[1, 8\]"),
        ({"group_starts": np.array([[0] * 6 + [6] * 6])}, r"\[0\] at token 6 is 6"),  # within a block
        ({"group_starts": np.array([[0] * 4 + [4] * 4 + [0] * 4])}, r"\[0\] at token 8 is 0"),
        (
            {"cu_seqlens": [torch.tensor([0, 5, 12])], "group_starts": np.zeros((1, 12), int)},
            r"\[0\] at token 5 is 0",
        ),
    ],
)
def test_a_mask_without_a_meaning_is_refused_by_value(arguments, message):
    with pytest.raises(BadInput, match=message):
        BlockDiffusionMask(**{"cu_seqlens": [torch.tensor([0, 12])], "block_size": 4, **arguments})
