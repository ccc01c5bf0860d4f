"""The output head on chosen positions alone, in chunks, under tensor and sequence parallelism."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch.utils.checkpoint import checkpoint

from llada_megatron.model.inputs import ModelInputs


class _IntoMainGradient(torch.autograd.Function):
    """The weight for one chunk of several: its gradient is added where DDP adds up those of micro-batches.

    In autograd's own sum, which has the weight's dtype, chunks would be rounded to bf16 again and again.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.main_grad = weight.main_grad  # type: ignore[attr-defined]
        return weight.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        ctx.main_grad.add_(gradient)


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
    """What `inputs.readout` says of the chosen rows, [N] or [N, columns].

    The `output_processor` of GPTModel.forward. hidden_states is [S/tp, B, H] under sequence parallelism
    and [S, B, H] otherwise. Each tensor-parallel rank holds V/tp columns, so the gradient of its input is
    a partial sum: gathering (or copying) adds the parts up exactly once in backward. Chunks of
    `head_chunk_tokens` are recomputed in backward unless one chunk is all, so that logits of more than
    one chunk never exist. The weight's gradient is summed over chunks in the dtype of `main_grad`, where DDP
    keeps one; the first chunk's goes the ordinary way, so that DDP learns when it is ready.
    """
    inputs, chunk_tokens = context
    readout, labels = inputs.readout, inputs.labels
    if readout.needs_labels and labels is None:
        raise ValueError(f"The readout {readout.name} needs labels: set ModelInputs.labels.")
    if config.sequence_parallel:
        hidden_states = gather_from_sequence_parallel_region(hidden_states)
    else:
        hidden_states = copy_to_tensor_model_parallel_region(hidden_states)
    chosen_NH = hidden_states.flatten(0, 1).index_select(0, inputs.outputs)
    group = parallel_state.get_tensor_model_parallel_group()

    weight_VH: Any = output_layer.weight if output_weight is None else output_weight

    def read(chunk_nH: torch.Tensor, labels_n: torch.Tensor | None, weight_VH: torch.Tensor) -> torch.Tensor:
        logits_n1V = output_layer(chunk_nH[:, None], weight=weight_VH)[0]  # V/tp columns
        return readout(logits_n1V[:, 0], labels_n, group)

    if chosen_NH.shape[0] <= chunk_tokens:
        return read(chosen_NH, labels, weight_VH)
    chunks = chosen_NH.split(chunk_tokens)
    labels_of_chunks = [None] * len(chunks) if labels is None else labels.split(chunk_tokens)
    # One by one: autograd runs what was made last first, and would keep all gradients until the last chunk's.
    weights = (_summed_apart(weight_VH) if number else weight_VH for number in range(len(chunks)))
    given = zip(chunks, labels_of_chunks, weights, strict=True)
    return torch.cat([checkpoint(read, *each, use_reentrant=False) for each in given])


def _summed_apart(weight: torch.Tensor) -> torch.Tensor:
    """The weight, whose gradient goes into `main_grad` where autograd would sum in fewer digits."""
    main_grad = getattr(weight, "main_grad", None)
    gains = main_grad is not None and main_grad.dtype.itemsize > weight.dtype.itemsize
    return _IntoMainGradient.apply(weight) if gains and torch.is_grad_enabled() else weight
