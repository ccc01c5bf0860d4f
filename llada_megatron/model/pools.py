"""Block routing (LLaDA2.2): the tokens of a block choose their experts from one pool of C.

    score_j = max over the block's tokens i of (sigmoid(x_ij) + b_j)
    pool    = the C experts of the largest score, of equal ones the lower numbers

x are a router's logits, b the bias of selection. A token then takes its k best of sigmoid(x_i) + b in the
pool, without groups of experts. The public statement is SGLang's (srt/models/llada2.py, `expert_capacity`).
Blocks are those of the mask, each half of `[x_t ; x_0]` apart: what is noisy never chooses for what is clean.

Legend: Q rows of a rank in a forward, S of them that its router sees (Q/tp), B samples, N = S B, E experts, P
numbers of blocks, w bits of one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from llada_megatron.attention.mask import Rectangle


def row_blocks(rectangle: Rectangle) -> tuple[np.ndarray, int]:
    """The number of each row's block in its sequence, int64 [B, Q], and w, which holds any of them.

    Noisy blocks come first, in order, then clean ones. Every rank of a micro-batch gets the same numbers.
    """
    mask = rectangle.mask
    is_first_BL = mask.block_start == np.arange(mask.length)
    rows = np.take_along_axis(is_first_BL.cumsum(axis=1) - 1, rectangle.tokens, axis=1)
    count = int(is_first_BL.sum(axis=1).max())
    if mask.clean_copy:
        rows, count = np.concatenate([rows, rows + count], axis=1), 2 * count
    return rows, (count - 1).bit_length()


def marks(block_BS: Tensor, bits: int, uncounted_BS: Tensor | None) -> Tensor:
    """bool [B, S, 1 + w]: whether the balance leaves a row out, and the bits of its block's number.

    megatron-core brings one tensor of bools to every router, as an argument of each layer and of what
    recompute runs again (`padding_mask`): micro-batches of a pipeline cannot mix their blocks up.
    """
    is_set = (block_BS[..., None] >> torch.arange(bits, device=block_BS.device)) & 1 != 0
    first = torch.zeros_like(block_BS, dtype=torch.bool) if uncounted_BS is None else uncounted_BS
    return torch.cat([first[..., None], is_set], dim=-1)


def read_marks(marks_SB: Tensor) -> tuple[Tensor, Tensor, int]:
    """From [S, B, 1 + w]: what is left out, bool [S, B], the blocks' numbers, int64 [N], and P.

    Blocks of several samples get numbers of their own: P = 2^w B.
    """
    _, B, planes = marks_SB.shape
    bits = torch.arange(planes - 1, device=marks_SB.device)
    block_SB = (marks_SB[..., 1:].long() << bits).sum(dim=-1)
    sample_B = torch.arange(B, device=marks_SB.device) << (planes - 1)
    return marks_SB[..., 0], (block_SB + sample_B).flatten(), B << (planes - 1)


def best_scores(score_NE: Tensor, block_N: Tensor, blocks: int, group: Any) -> Tensor:
    """score_j of each block, fp32 [P, E], whose rows lie on the ranks of `group`; -inf without any row."""
    best_PE = score_NE.new_full((blocks, score_NE.shape[1]), float("-inf"))
    best_PE.scatter_reduce_(0, block_N[:, None].expand_as(score_NE), score_NE, "amax")
    if group.size() > 1:
        dist.all_reduce(best_PE, op=dist.ReduceOp.MAX, group=group)
    return best_PE


def pools_of(best_PE: Tensor, capacity: int) -> Tensor:
    """Which experts are in each block's pool, bool [P, E]."""
    order = best_PE.argsort(dim=1, descending=True, stable=True)[:, :capacity]
    return torch.zeros_like(best_PE, dtype=torch.bool).scatter_(1, order, True)


def in_pool(score_NE: Tensor, block_N: Tensor, blocks: int, capacity: int, group: Any) -> Tensor:
    """The scores [N, E] that count in the choice of a row's experts: -inf outside of its block's pool."""
    pool_PE = pools_of(best_scores(score_NE, block_N, blocks, group), capacity)
    return score_NE.masked_fill(~pool_PE[block_N], float("-inf"))
