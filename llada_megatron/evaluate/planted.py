"""What a model makes of wrong tokens in text: planted ones that it mends, right ones that it spoils.

A share of the held-out tokens is replaced by other tokens of the same text (objectives/editing.py), none is
masked, and one forward edits as the decoding rule `joint` does: another token is put where its probability is
above EDIT_THRESHOLD. It sees what training shows: a block with its wrong tokens, after clean ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.model.readout import proposal
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.diffusion import diffusion_inputs
from llada_megatron.objectives.editing import maskable, with_wrong_words
from llada_megatron.parallel.random import Purpose, generator

EDIT_THRESHOLD = 0.5
NAMES = ("wrong before", "wrong after", "mended, of the wrong", "spoiled, of the right")
TALLIES = 5
"""Tokens; wrong before, wrong after; mended, spoiled."""


class Planted:
    """Batches of held-out text with wrong tokens, and what came of them."""

    def __init__(self, config: Config, block_size: int) -> None:
        self.config, self.block_size = config, block_size

    def batch(self, samples: list[PackedSample], places: list[int]) -> MicroBatch:
        """`[x ; x_0]` with wrong tokens in x; places: what each sample's are drawn by."""
        seed, share = self.config.run.seed, self.config.evaluation.planted_share
        texts, rows = [], []
        for sample, place in zip(samples, places, strict=True):
            at_random = generator(seed, Purpose.PLANTED_PLACE, place).random(len(sample.tokens)) < share
            text, _ = with_wrong_words(
                sample,
                at_random & maskable(sample),
                generator(seed, Purpose.PLANTED_WORD, place),
                self.config.diffusion.editing,
                self.config.model.mask_token_id,
            )
            texts.append(text)
            rows.append(maskable(sample))
        inputs = diffusion_inputs(
            samples,
            rows,
            block_size=self.block_size,
            grid=self.config.diffusion.block_grid,
            mask_token_id=self.config.model.mask_token_id,
        )
        inputs.tokens[:, : len(texts[0])] = torch.from_numpy(np.stack(texts))
        read = np.concatenate([text[row] for text, row in zip(texts, rows, strict=True)])
        batch = MicroBatch(
            replace(inputs, readout=proposal(self.config.model.mask_token_id)),
            {"read": torch.from_numpy(read), "true": inputs.labels},
        )
        return batch

    def tallies(self, batch: MicroBatch, output: torch.Tensor) -> torch.Tensor:
        """fp64 [B, TALLIES] of this rank's rows; output: choice and probability [N, 2]."""
        B, read, true = len(batch.inputs.tokens), batch.rows["read"], batch.rows["true"]
        after = torch.where(output[:, 1] > EDIT_THRESHOLD, output[:, 0].long(), read)
        was_wrong, is_wrong = read != true, after != true
        tallies = [
            torch.ones_like(was_wrong),
            was_wrong,
            is_wrong,
            was_wrong & ~is_wrong,
            ~was_wrong & is_wrong,
        ]
        found = torch.zeros(B, TALLIES, dtype=torch.float64, device=output.device)
        return found.index_add_(0, batch.inputs.outputs % B, torch.stack(tallies, dim=-1).double())


def shares_of(tallies: np.ndarray) -> dict[str, dict[str, Any]]:
    """`mean` and `se` over sequences of each of NAMES, from tallies [sequences, TALLIES]."""
    tokens, before, after, mended, spoiled = tallies.T
    parts = (before, tokens), (after, tokens), (mended, before), (spoiled, tokens - before)
    return {name: _share(*part) for name, part in zip(NAMES, parts, strict=True)}


def _share(part: np.ndarray, whole: np.ndarray) -> dict[str, Any]:
    """Of a ratio of sums; the standard error is that of the linearised ratio."""
    if not whole.sum():
        return {"mean": None, "se": None}
    mean, n = part.sum() / whole.sum(), len(part)
    error = float(np.sqrt(n / (n - 1) * ((part - mean * whole) ** 2).sum()) / whole.sum()) if n > 1 else None
    return {"mean": float(mean), "se": error}
