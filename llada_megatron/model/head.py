"""The output head on chosen positions alone, in chunks, under tensor and sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from torch.utils.checkpoint import checkpoint

from llada_megatron.model.inputs import ModelInputs


def reduce_input_gradient_once(output_layer: torch.nn.Module) -> None:
    """Stop the head from gathering and reducing by itself: `head_output` does both, once for all chunks."""
    output_layer.sequence_parallel = False  # type: ignore[assignment]
    output_layer.allreduce_dgrad = False  # type: ignore[assignment]
    output_layer.disable_grad_reduce = True  # type: ignore[assignment]


def head_output(
    *,
    hidden_states: torch.Tensor,
    output_layer: torch.nn.Module,
    output_weight: torch.Tensor | None,
    context: tuple[ModelInputs, int],
    config: Any,
    **unused: Any,
) -> torch.Tensor:
    """Cross entropy fp32 [N] at the chosen positions, or their logits [N, V] when there are no labels.

    The `output_processor` of GPTModel.forward. hidden_states is [S/tp, B, H] under sequence parallelism
    and [S, B, H] otherwise. Each tensor-parallel rank holds V/tp columns, so the gradient of its input is
    a partial sum: gathering (or copying) adds the parts up exactly once in backward. Chunks of
    `head_chunk_tokens` are recomputed in backward unless one chunk is all, so that logits of more than
    one chunk never exist.
    """
    inputs, chunk_tokens = context
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
    chosen_NH = hidden_states.flatten(0, 1).index_select(0, inputs.outputs)

    def logits(chunk_nH: torch.Tensor) -> torch.Tensor:
        return output_layer(chunk_nH[:, None], weight=output_weight)[0]  # [n, 1, V/tp]

    if inputs.labels is None:
        return gather_from_tensor_model_parallel_region(logits(chosen_NH))[:, 0]

    def cross_entropy(chunk_nH: torch.Tensor, labels_n: torch.Tensor) -> torch.Tensor:
        return tensor_parallel.vocab_parallel_cross_entropy(logits(chunk_nH).float(), labels_n[:, None])[:, 0]

    if chosen_NH.shape[0] <= chunk_tokens:
        return cross_entropy(chosen_NH, inputs.labels)
    chunks = zip(chosen_NH.split(chunk_tokens), inputs.labels.split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(cross_entropy, *chunk, use_reentrant=False) for chunk in chunks])
