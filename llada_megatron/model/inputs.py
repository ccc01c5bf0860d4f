"""What one micro-batch hands to the model on every pipeline stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from llada_megatron.attention.keys import Keys
from llada_megatron.model.readout import CROSS_ENTROPY, Readout


@dataclass
class EmbeddingNoise:
    """Gaussian noise on the embeddings of masked tokens; seeds are per sample, so it knows no layout."""

    sigma: float
    seeds: list[int]
    """One per sample of the micro-batch."""
    drawn: list[int]
    """Per sample the masked tokens of the whole sequence: the rows of noise that every rank draws."""
    rows: list[torch.Tensor]
    """Per sample int64 [n]: the rows of this rank whose embeddings get noise."""
    places: list[torch.Tensor] | None = None
    """Per sample int64 [n]: which of the drawn rows those get; None for all of them, in order."""


@dataclass
class SoftTokens:
    """Rows whose embedding is partly that of their token, and for the rest the mask token's."""

    weights: torch.Tensor
    """float32 [B, S], from 0 to 1: the token's part."""
    mask_token_id: int

    @classmethod
    def of(cls, weights_S: np.ndarray, mask_token_id: int, at: torch.device) -> SoftTokens | None:
        """Those of one sample on a device; None where every row is wholly its token."""
        if (weights_S == 1).all():
            return None
        return cls(torch.from_numpy(weights_S).float()[None].to(at), mask_token_id)


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
    noisy_outputs: bool = False
    """Whether all N rows lie in the noisy half of `[x_t ; x_0]`: what the last layer makes of the clean half
    is then read by nobody."""
    soft: SoftTokens | None = None
    """None: every row is its token."""
    draws: torch.Tensor | None = None
    """float32 [B, S] in [0, 1), by which the family `dlcm` draws boundaries; None: none are drawn."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> ModelInputs:
        """The inputs with function(tensor) in the place of every tensor that the device reads."""
        noise = self.noise
        if noise is not None:
            noise = replace(
                noise,
                rows=[function(rows) for rows in noise.rows],
                places=None if noise.places is None else [function(places) for places in noise.places],
            )
        soft = self.soft
        if soft is not None:
            soft = replace(soft, weights=function(soft.weights))
        return replace(
            self,
            tokens=function(self.tokens),
            positions=function(self.positions),
            outputs=function(self.outputs),
            labels=None if self.labels is None else function(self.labels),
            noise=noise,
            soft=soft,
            draws=None if self.draws is None else function(self.draws),
        )
