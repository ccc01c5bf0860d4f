"""The decoder that others are compared with: block by block, without a cache, one sequence at a time.

LLaDA2.0, section 5.4: forwards over a block change the tokens that a rule says (rules/); the finished block
is then history for the next. Each forward computes the whole sequence up to the block's end anew, or all of
it where every position sees every other.

Legend: L tokens of a sequence, m positions of a block.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid
from llada_megatron.generate.rules import Change, Draws, Figures, Rule, Seen, figures_of
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.runtime import device


@dataclass(frozen=True)
class Canvas:
    """A sequence to be filled, and where its blocks are."""

    tokens: np.ndarray
    """int64 [L]; changed in place."""
    block_size: int
    mask_token_id: int
    grid: BlockGrid = BlockGrid.sequence
    cu_seqlens: np.ndarray | None = None
    """int [documents + 1]: documents do not see each other; None: one document."""
    full_from: int | None = None
    """Every position sees every other, and blocks count from here; None: later blocks are not seen."""

    def boundaries(self) -> np.ndarray:
        """Edges of the documents."""
        return np.array([0, len(self.tokens)]) if self.cu_seqlens is None else self.cu_seqlens

    def blocks(self) -> list[tuple[int, int]]:
        """[start, end) of what is filled together: blocks of each document's grid, or of the sequence's.

        A block of the sequence's grid that several documents share is filled in all of them at once.
        """
        edges = self.boundaries()
        edges = edges if self.grid is BlockGrid.document else edges[[0, -1]]
        if self.full_from is not None:
            edges = np.array([self.full_from, len(self.tokens)])
        return [
            (int(start), int(min(start + self.block_size, last)))
            for first, last in pairwise(edges)
            for start in range(first, last, self.block_size)
        ]

    def reach(self, end: int) -> int:
        """One past the last position that a block which ends at `end` sees."""
        return end if self.full_from is None else len(self.tokens)

    def mask(self, end: int) -> BlockDiffusionMask:
        """Who sees whom among the tokens before `end`, the reach of a block."""
        boundaries = self.boundaries()
        return BlockDiffusionMask(
            [torch.tensor([*boundaries[boundaries < end], end])],
            min(self.block_size, end),
            block_grid=self.grid,
            clean_copy=False,
            causal=self.full_from is None,
        )


@torch.no_grad()
def look(model: Any, canvas: Canvas, start: int, end: int, figures: Figures) -> dict[str, np.ndarray]:
    """One forward of what the block [start, end) sees: the figures of its rows, as fields of `Seen`.

    The model is called in the mode it is in: call `eval()` first. Raises BadInput under pipeline parallelism.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise BadInput("Decoding serves one pipeline stage: set layout.pp=1.")
    reach = canvas.reach(end)
    inputs = ModelInputs(
        tokens=torch.from_numpy(canvas.tokens[:reach])[None].to(device.device()),
        positions=torch.arange(reach, device=device.device())[None],
        keys=ContextShard(canvas.mask(reach)),
        outputs=torch.arange(start, end, device=device.device()),
        readout=figures.readout(canvas.mask_token_id),
    )
    return figures_of(figures, model(inputs).double().cpu().numpy(), canvas.mask_token_id)


def block_forwards(
    model: Any, canvas: Canvas, start: int, end: int, rule: Rule, draws: Draws
) -> Iterator[tuple[Seen, Change]]:
    """Forwards of one block until its rule is done; the canvas changes before each pair is yielded.

    What is no mask token at the start is given. A block without masks has no forwards.
    """
    is_given_m = canvas.tokens[start:end] != canvas.mask_token_id
    state = None
    for step in itertools.count() if not is_given_m.all() else ():
        tokens_m = canvas.tokens[start:end].copy()
        seen = Seen(
            tokens_m,
            is_given_m,
            (tokens_m == canvas.mask_token_id) & ~is_given_m,
            **look(model, canvas, start, end, rule.figures),
            step=step,
            first=start,
            mask_token_id=canvas.mask_token_id,
            draws=draws,
        )
        change = rule.step(seen, state)
        canvas.tokens[start:end], state = change.tokens_m, change.state
        yield seen, change
        if change.is_done:
            return


def reference_loop(
    model: Any, canvas: Canvas, rule: Rule, draws: Draws | None = None
) -> tuple[np.ndarray, int]:
    """Fill every mask token of a canvas, block by block; returns the tokens, int64 [L], and the forwards.

    The canvas itself is changed. Without `draws` a rule that draws has those of seed 0.
    """
    forwards = 0
    for start, end in canvas.blocks():
        for _ in block_forwards(model, canvas, start, end, rule, draws or Draws(seed=0)):
            forwards += 1
    return canvas.tokens, forwards
