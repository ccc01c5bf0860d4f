"""Minimal greedy decoder: fills masked positions block by block, left to right, without a KV cache.

LLaDA2.0, section 5.4: a forward over a block fills the masked positions that a rule accepts (rules.py); the
finished block is then history for the next.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid
from llada_megatron.generate.rules import RULES
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import LOGITS
from llada_megatron.runtime import device


@torch.no_grad()
def infill(
    model: Any,
    tokens: np.ndarray,
    *,
    block_size: int,
    mask_token_id: int,
    rule: str = "threshold",
    threshold: float = 0.95,
    steps: int | None = None,
    grid: BlockGrid = BlockGrid.sequence,
    cu_seqlens: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Replace every mask token of `tokens` (int64 [L]) greedily; returns the tokens and the forwards used.

    At most `steps` (default: block_size) forwards per block. In forward s the `rule` accepts at least
    need_s = block_size // steps positions, one more in the first block_size % steps forwards. cu_seqlens, int
    [documents + 1]: documents do not see each other; default: one document. The model is called in the mode
    it is in: call `eval()` first. Raises BadInput for an unknown rule, and under pipeline parallelism, which
    this decoder does not serve.
    """
    if rule not in RULES:
        raise BadInput(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise BadInput("Decoding serves one pipeline stage: set layout.pp=1.")
    filled, forwards = tokens.copy(), 0
    boundaries = np.array([0, len(tokens)]) if cu_seqlens is None else cu_seqlens
    steps = steps or block_size
    for start, end in _blocks(boundaries, block_size, grid):
        for step in range(steps):
            candidates = start + np.flatnonzero(filled[start:end] == mask_token_id)
            if not len(candidates):
                break
            documents = [*boundaries[boundaries < end], end]
            mask = BlockDiffusionMask(
                [torch.tensor(documents)],
                min(block_size, end),
                block_grid=grid,
                clean_copy=False,
                causal=True,
            )
            probability, choice = _predict(model, filled[:end], candidates, mask)
            forwards += 1
            need = block_size // steps + int(step < block_size % steps)
            accepted = RULES[rule](probability, need, threshold)
            filled[candidates[accepted]] = choice[accepted]
    return filled, forwards


def _blocks(boundaries: np.ndarray, block_size: int, grid: BlockGrid) -> list[tuple[int, int]]:
    """[start, end) of what is filled together: blocks of each document's grid, or of the sequence's.

    A block of the sequence's grid that several documents share is filled in all of them at once.
    """
    edges = boundaries if grid is BlockGrid.document else boundaries[[0, -1]]
    return [
        (int(start), int(min(start + block_size, last)))
        for first, last in pairwise(edges)
        for start in range(first, last, block_size)
    ]


def _predict(
    model: Any, window: np.ndarray, candidates: np.ndarray, mask: BlockDiffusionMask
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token and its probability at each candidate, seeing the window block-causally."""
    inputs = ModelInputs(
        tokens=torch.from_numpy(window)[None].to(device.device()),
        positions=torch.arange(len(window), device=device.device())[None],
        keys=ContextShard(mask),
        outputs=torch.from_numpy(candidates).to(device.device()),
        readout=LOGITS,
    )
    probability, choice = model(inputs).float().softmax(dim=-1).max(dim=-1)  # logits [N, V]
    return probability.cpu().numpy(), choice.cpu().numpy()
