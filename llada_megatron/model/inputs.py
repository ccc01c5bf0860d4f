"""What one micro-batch hands to the model on every pipeline stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llada_megatron.attention.keys import Keys
from llada_megatron.model.readout import CROSS_ENTROPY, Readout


@dataclass
class EmbeddingNoise:
    """Gaussian noise on the embeddings of masked tokens; seeds are per sample, so it knows no layout."""

    sigma: float
    seeds: list[int]
    """One per sample of the micro-batch."""
    rows: list[torch.Tensor]
    """Per sample int64 [masked tokens of the whole sequence]: the row of this rank whose embedding gets the
    noise of that token, or -1 where another context-parallel rank holds it."""


@dataclass
class ModelInputs:
    """S = 2L with a clean copy (noisy half first), else L; B samples; N rows that the head is applied to.

    Under context parallelism S, N and everything else is this rank's part: see `objectives/batch.py`. With
    kept keys the rows are those at hand.
    """

    tokens: torch.Tensor
    """int64 [B, S]."""
    positions: torch.Tensor
    """int64 [B or 1, S]: place of each row in its sequence, 0..L-1; twice with a clean copy."""
    keys: Keys
    """The attention mask, and which keys exist for these rows."""
    outputs: torch.Tensor
    """int64 [N]: rows of the hidden states, flattened as s * B + b, that the head is applied to."""
    labels: torch.Tensor | None = None
    """int64 [N], where the readout needs them."""
    readout: Readout = CROSS_ENTROPY
    """What the model returns for each of the N rows."""
    noise: EmbeddingNoise | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ModelInputs:
        """The inputs with function(tensor) in the place of every tensor that the device reads."""
        noise = self.noise
        if noise is not None:
            noise = replace(noise, rows=[function(rows) for rows in noise.rows])
        return replace(
            self,
            tokens=function(self.tokens),
            positions=function(self.positions),
            outputs=function(self.outputs),
            labels=None if self.labels is None else function(self.labels),
            noise=noise,
        )
