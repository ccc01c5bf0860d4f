"""Decoupled muP of the family `dlcm` (arXiv 2512.24617; Yang et al., arXiv 2203.03466): what a width divides.

With s = width of a parameter's inputs over concepts.mup_base_hidden_size, apart for tokens and for concepts:

    matrices between widths   std / sqrt(s), rate / s, eps / s
    embedding, head, norms    as they are; logits of tokens / s
"""

from __future__ import annotations

from llada_megatron.config.schema import ModelConfig


def is_vector_like(name: str) -> bool:
    """Whether one side of a parameter alone grows with the width, by its name in a checkpoint."""
    ends = name.startswith(("embedding.", "output_layer."))
    return ends or "norm" in name or name.endswith(("bias", "concept_attention.start"))


def width_ratio(model: ModelConfig, name: str) -> float:
    """s of a parameter, by its name in a checkpoint; 1 without muP."""
    base = model.concepts.mup_base_hidden_size
    if not base:
        return 1.0
    reads_concepts = name.startswith("backbone.") or "concept_attention.linear_kv" in name
    return (model.concepts.hidden_size if reads_concepts else model.hidden_size) / base


def rate_divisor(model: ModelConfig, name: str) -> float:
    """What a parameter's learning rate, its eps and its initial variance are divided by."""
    return 1.0 if is_vector_like(name) else width_ratio(model, name)
