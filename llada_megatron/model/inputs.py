"""What one micro-batch hands to the model on every pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llada_megatron.attention import BlockDiffusionMask


@dataclass
class EmbeddingNoise:
    """Gaussian noise on the embeddings of masked tokens; seeds are per sample, so it knows no layout."""

    sigma: float
    seeds: list[int]
    """One per sample of the micro-batch."""
    masked: torch.Tensor
    """bool [B, S]: positions whose embedding gets noise."""


@dataclass
class ModelInputs:
    """S = 2L with a clean copy (noisy half first), else L; B samples; N supervised positions."""

    tokens: torch.Tensor
    """int64 [B, S]."""
    positions: torch.Tensor
    """int64 [S]: 0..L-1, twice with a clean copy."""
    mask: BlockDiffusionMask
    outputs: torch.Tensor
    """int64 [N]: rows of the hidden states, flattened as s * B + b, that the head is applied to."""
    labels: torch.Tensor | None = None
    """int64 [N]; without labels the model returns logits [N, V]."""
    noise: EmbeddingNoise | None = None
