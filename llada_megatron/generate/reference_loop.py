"""The decoders that others are compared with: without a cache, one sequence at a time.

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
from llada_megatron.attention.keys import KeyPool, Keys, PooledKeys, PoolPart
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid
from llada_megatron.generate.methods import Method
from llada_megatron.generate.prompt import Result
from llada_megatron.generate.rules import Change, Draws, Figures, Rule, Seen, figures_of, label_probability
from llada_megatron.generate.running import Running
from llada_megatron.model.inputs import ModelInputs, SoftTokens
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


def look(
    model: Any,
    canvas: Canvas,
    start: int,
    end: int,
    figures: Figures,
    weight_m: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """One forward of what the block [start, end) sees: the figures of its rows, as fields of `Seen`.

    weight_m: float [end - start], how much of its embedding is a token's (`Change.weight_m`); None: all. As
    `read`.
    """
    reach = canvas.reach(end)
    weights = np.ones(reach)
    if weight_m is not None:
        weights[start:end] = weight_m
    seen = canvas.tokens[:reach], canvas.mask(reach)
    output = read(model, *seen, np.arange(start, end), figures, canvas.mask_token_id, weights)
    return figures_of(figures, output, canvas.mask_token_id)


def shadow(model: Any, canvas: Canvas, block: slice, rows: np.ndarray, figures: Figures) -> np.ndarray:
    """One forward of what a block sees and of its shadow (attention/keys.py): what the head says of the
    shadow's rows at n positions of the block, float64 [n, C].

    Serves a canvas of one document.
    """
    assert canvas.cu_seqlens is None
    reach, m = canvas.reach(block.stop), block.stop - block.start
    places = np.arange(reach + m)
    parts = [PoolPart(0, places[:reach]), PoolPart(block, places[:reach], places[reach:])]
    keys = PooledKeys(KeyPool(reach + m), parts, canvas.block_size if canvas.full_from is None else reach)
    tokens = np.append(canvas.tokens[:reach], np.full(m, canvas.mask_token_id))
    chosen = reach + rows - block.start
    return forward(model, tokens, keys, keys.positions, chosen, canvas.tokens[rows], figures, tokens[-1])


def read(
    model: Any,
    tokens: np.ndarray,
    mask: BlockDiffusionMask,
    rows: np.ndarray,
    figures: Figures,
    mask_token_id: int,
    weights: np.ndarray | None = None,
) -> np.ndarray:
    """One forward of tokens, int64 [S]: what the head says of n rows of them, float64 [n, C].

    weights: float [S], how much of its embedding is a token's (`Change.weight_m`); None: all.
    The model is called in the mode it is in: call `eval()` first. Raises BadInput under pipeline parallelism.
    """
    soft = None if weights is None else SoftTokens.of(weights, mask_token_id, device.device())
    about = ContextShard(mask), np.arange(len(tokens)), rows, tokens[rows]
    return forward(model, tokens, *about, figures, mask_token_id, soft)


@torch.no_grad()
def forward(
    model: Any,
    tokens: np.ndarray,
    keys: Keys,
    positions: np.ndarray,
    rows: np.ndarray,
    labels: np.ndarray,
    figures: Figures,
    mask_token_id: int,
    soft: SoftTokens | None = None,
) -> np.ndarray:
    """What the head says of n rows of those at hand, int64 [S] and their positions: float64 [n, C].

    labels: int64 [n], the tokens that `Figures.label` is about.
    """
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        raise BadInput("Decoding serves one pipeline stage: set layout.pp=1.")
    inputs = ModelInputs(
        tokens=torch.from_numpy(tokens)[None].to(device.device()),
        positions=torch.from_numpy(positions)[None].to(device.device()),
        keys=keys.to(device.device()),
        outputs=torch.from_numpy(rows).to(device.device()),
        labels=torch.from_numpy(labels).to(device.device()),
        readout=figures.readout(mask_token_id),
        soft=soft,
    )
    return model(inputs).double().cpu().numpy()


def block_forwards(
    model: Any, canvas: Canvas, start: int, end: int, rule: Rule, draws: Draws
) -> Iterator[tuple[Seen, Change]]:
    """Forwards of one block until its rule is done; the canvas changes before each pair is yielded.

    What is no mask token at the start is given. A block without masks has no forwards.
    """
    is_given_m = canvas.tokens[start:end] != canvas.mask_token_id
    state = weight_m = None
    for step in itertools.count() if not is_given_m.all() else ():
        tokens_m = canvas.tokens[start:end].copy()
        is_masked_m = (tokens_m == canvas.mask_token_id) & ~is_given_m
        verified_m = np.ones(len(tokens_m)) if rule.verifies else None
        if verified_m is not None and not (is_given_m | is_masked_m).all():
            rows = start + np.flatnonzero(~is_given_m & ~is_masked_m)
            output = shadow(model, canvas, slice(start, end), rows, rule.figures)
            verified_m[rows - start] = label_probability(rule.figures, output, canvas.tokens[rows])
        seen = Seen(
            tokens_m,
            is_given_m,
            is_masked_m,
            **look(model, canvas, start, end, rule.figures, weight_m),
            verified_m=verified_m,
            step=step,
            first=start,
            mask_token_id=canvas.mask_token_id,
            draws=draws,
            must_fill=True,
        )
        change = rule.step(seen, state)
        canvas.tokens[start:end], state, weight_m = change.tokens_m, change.state, change.weight_m
        yield seen, change
        if change.is_done:
            return


def recomputed(model: Any, running: Running, method: Method, seed: int = 0) -> Result:
    """A sequence decoded by any method as `Decoder` does, each forward of each branch computed anew."""
    while True:
        figures = method.lookahead.figures(method.rule.figures)
        outputs = []
        for branch in running.branches:
            canvas = Canvas(branch.tokens, running.block_size, running.mask_token_id)
            rows = running.rows_read(branch, method.rule)
            seen = branch.tokens[: branch.stop], canvas.mask(branch.stop)
            weights = running.weights[: branch.stop]
            outputs.append(read(model, *seen, rows, figures, running.mask_token_id, weights))
        for block, rows in running.shadows(method.rule):
            canvas = Canvas(running.tokens, running.block_size, running.mask_token_id)
            outputs.append(shadow(model, canvas, slice(block.start, block.stop), rows, figures))
        changed, _ = running.step(method, outputs, seed)
        result = running.ended(changed, method.rule, None)
        running.advance(method.buffer)
        if result is not None:
            return result


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


def next_tokens(
    model: Any, prompt: np.ndarray, count: int, rule: Rule, *, mask_token_id: int, draws: Draws | None = None
) -> np.ndarray:
    """The `count` tokens, int64, that a model which predicts next tokens writes behind a prompt.

    Every forward reads all tokens anew. Without `draws` a rule that draws has those of seed 0.
    """
    tokens, masked = np.asarray(prompt, np.int64), np.array([mask_token_id])
    for length in range(len(tokens), len(tokens) + count):
        mask = BlockDiffusionMask([torch.tensor([0, length])], 1, clean_copy=False, causal=True)
        output = read(model, tokens, mask, np.array([length - 1]), rule.figures, mask_token_id)
        seen = Seen(
            masked,
            np.array([False]),
            np.array([True]),
            **figures_of(rule.figures, output, mask_token_id),
            step=0,
            first=length,
            mask_token_id=mask_token_id,
            draws=draws or Draws(seed=0),
            must_fill=True,
        )
        tokens = np.append(tokens, rule.step(seen, None).tokens_m)
    return tokens[len(prompt) :]
