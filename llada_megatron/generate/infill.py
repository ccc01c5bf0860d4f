"""Minimal greedy decoder: fills masked positions block by block, left to right, without a KV cache.

LLaDA2.0, section 5.4: inside a block every masked position whose probability exceeds a threshold is
accepted at once, otherwise the most probable ones are; the finished block is then history for the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid
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
    threshold: float = 0.95,
    steps: int | None = None,
    grid: BlockGrid = BlockGrid.sequence,
    cu_seqlens: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Replace every mask token of `tokens` (int64 [L]) greedily; returns the tokens and the forwards used.

    At most `steps` (default: block_size) forwards per block. In forward s at least
    need_s = block_size // steps positions are accepted, one more in the first block_size % steps forwards:
    all with p > threshold if those are enough, else the need_s most probable. cu_seqlens, int
    [documents + 1]: documents do not see each other; default: one document. Raises BadInput under
    pipeline parallelism, which this decoder does not serve.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise BadInput("Decoding serves one pipeline stage: set layout.pp=1.")
    filled, forwards = tokens.copy(), 0
    boundaries = np.array([0, len(tokens)]) if cu_seqlens is None else cu_seqlens
    steps = steps or block_size
    for start in range(0, len(tokens), block_size):
        end = min(start + block_size, len(tokens))
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
            accepted = np.flatnonzero(probability > threshold)
            if len(accepted) < need:
                accepted = np.argsort(-probability, kind="stable")[:need]
            filled[candidates[accepted]] = choice[accepted]
    return filled, forwards


def _predict(
    model: Any, window: np.ndarray, candidates: np.ndarray, mask: BlockDiffusionMask
) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token and its probability at each candidate, seeing the window block-causally."""
    inputs = ModelInputs(
        tokens=torch.from_numpy(window)[None].to(device.device()),
        positions=torch.arange(len(window), device=device.device())[None],
        shard=ContextShard(mask),
        outputs=torch.from_numpy(candidates).to(device.device()),
        readout=LOGITS,
    )
    model.eval()
    probability, choice = model(inputs).float().softmax(dim=-1).max(dim=-1)  # logits [N, V]
    model.train()
    return probability.cpu().numpy(), choice.cpu().numpy()
