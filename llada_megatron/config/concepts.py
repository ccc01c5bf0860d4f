"""Concepts of the family `dlcm` (arXiv 2512.24617): what is between its encoder and its decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.choices import BoundaryGrad, ConceptAttention, ConceptOf
from llada_megatron.config.ranges import Amount, Extent, Range

ROWS = 64
"""The backbone's rows are a multiple of this and of tp, so that shapes are few and fit kernels."""
CHANNELS = 8
"""Added to queries and keys of replicated concepts for log(copies): as many as kernels want head_dim to be a
multiple of."""


@dataclass
class ConceptsConfig:
    """The backbone over concepts; the settings of ModelConfig are those of tokens, and head_dim of both.

    model.layers counts encoder, backbone and decoder; model.dense_layers all but the backbone's last ones,
    which are those with experts.
    """

    encoder_layers: Extent = 0
    decoder_layers: Extent = 0
    hidden_size: Extent = 0
    heads: Extent = 0
    kv_heads: Extent = 0
    ffn_hidden_size: Extent = 0
    """Width of the backbone's dense feed-forward layers."""
    tokens_per_concept: Annotated[float, Range(above=1, at_most=1e4)] = 4.0
    """R, which the parser aims at over the global batch."""
    parser_weight: Amount = 0.03
    """Of the global parser's loss beside the next tokens' (lambda)."""
    sharpening: Annotated[float, Range(at_least=1, at_most=1e4)] = 6.0
    """tau: training draws boundaries with p^(1/tau) and its mirror image; 1 draws with p itself."""
    concept: ConceptOf = ConceptOf.mean
    """What a concept is made of; a token sees a mean when it is finished, a boundary token at once."""
    boundary_grad: BoundaryGrad = BoundaryGrad.none
    """Whether the next tokens' loss reaches the boundary detector: DLCM keeps them apart."""
    attention: ConceptAttention = ConceptAttention.ragged
    """How tokens attend to concepts: one key each, or one per token of it; the result is the same."""
    mup_base_hidden_size: Extent = 0
    """Decoupled muP: rates, eps, initial weights and logits by each part's width over this; 0: no muP."""

    def backbone_layers(self, layers: int) -> int:
        """Of model.layers."""
        return layers - self.encoder_layers - self.decoder_layers
