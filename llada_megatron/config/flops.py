"""Closed-form FLOPs of a training step; counts multiply and add, without torch."""

from __future__ import annotations

from llada_megatron.config.schema import ModelConfig


def active_parameters_per_layer(model: ModelConfig, layer: int) -> int:
    """Weights of matrices that one token passes through in a layer."""
    qkv = model.hidden_size * (model.heads + 2 * model.kv_heads) * model.head_dim
    attention = qkv + model.heads * model.head_dim * model.hidden_size
    if layer < model.dense_layers:
        return attention + 3 * model.hidden_size * model.ffn_hidden_size
    routed = 3 * model.hidden_size * model.expert_hidden_size * model.experts_per_token
    shared = 3 * model.hidden_size * model.shared_expert_hidden_size
    return attention + routed + shared + model.hidden_size * model.experts


def training_flops_per_sequence(
    model: ModelConfig, *, positions: int, pairs: float, supervised: float, head_recomputed: bool = False
) -> float:
    """Forward and backward FLOPs of one sequence, without recompute of the layers.

    positions: tokens that pass the layers (2L with a clean copy, else L); pairs: query-key pairs of one
    attention layer; supervised: positions that pass the head. A weight costs 2 FLOPs forward and 4
    backward per token; a pair costs 4 head_dim FLOPs per head forward (scores and values) and 8 backward.
    """
    weights = sum(active_parameters_per_layer(model, layer) for layer in range(model.layers))
    matrices = 6 * weights * positions
    attention = 12 * model.heads * model.head_dim * model.layers * pairs
    head = (8 if head_recomputed else 6) * model.hidden_size * model.vocab_size * supervised
    return matrices + attention + head


def expected_pairs(sequence_length: int, block_size: int, *, clean_copy: bool, causal: bool) -> float:
    """Visible pairs of one layer for a sequence that is one document.

    With a clean copy: L*block (own noisy blocks) + L(L - block)/2 + L(L + block)/2 = L^2 + L*block.
    """
    if clean_copy:
        return float(sequence_length * sequence_length + sequence_length * block_size)
    if causal:
        return sequence_length * (sequence_length + block_size) / 2
    return float(sequence_length * sequence_length)
