"""megatron-core's own model in one process: what tensors it has, and what it computes from a checkpoint."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from torch import Tensor
from torch._subclasses import FakeTensorMode

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.checkpoint import store
from llada_megatron.config.choices import LayerSpec
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config, DataConfig, ModelConfig
from llada_megatron.convert.families.family import Logits
from llada_megatron.model.gpt import BlockDiffusionStage
from llada_megatron.model.initialize import SHARDING_METADATA
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_stage
from llada_megatron.model.readout import LOGITS
from llada_megatron.runtime import device

MAX_PARAMETERS = 200_000_000
"""Larger models are not run: a conversion must not need the memory of a whole model."""
PROMPT_TOKENS = 24
STRIDES = (1, 7)
"""Of the positions of each prompt: 0..23, and 0..161 for slow rotary frequencies; fp32 bears no more."""


def model_tensors(model: ModelConfig) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shape by checkpoint key of every tensor of the model, and its parameters; no weight is allocated."""
    with FakeTensorMode():
        stage = _stage(model, sequence_length=1)
        shapes = {key: shape for key, shape, _, _ in _sharded(stage)}
    return shapes, sum(parameter.numel() for parameter in stage.parameters())


def load_model(checkpoint: Path, model: ModelConfig, *, sequence_length: int) -> BlockDiffusionStage:
    """The model with a checkpoint's weights, fp32 in the `local` layer spec, in one process.

    Raises BadInput when the checkpoint does not fit or leaves a parameter without a value.
    """
    stage = _stage(model, sequence_length=sequence_length).to(device.device())
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.fill_(math.nan)
    store.load(checkpoint, [stage], None)
    if unset := [name for name, parameter in stage.named_parameters() if not parameter.isfinite().all()]:
        raise BadInput(f"{checkpoint} leaves {', '.join(unset)} without a value.")
    return stage


def gradients(stage: BlockDiffusionStage) -> dict[str, Tensor]:
    """Gradients of a single-process model under the keys of its checkpoint, whole; zero where none came."""
    found: dict[str, Tensor] = {}
    for key, shape, offset, data in _sharded(stage, of_gradients=True):
        whole = found.setdefault(key, torch.zeros(shape))
        part = data.reshape((1,) * (len(shape) - data.dim()) + data.shape)
        whole[tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))] = part
    return found


def compare_logits(expected: Logits, checkpoint: Path, model: ModelConfig) -> dict[str, Any]:
    """Largest difference between a family's reference and the model that loads `checkpoint`."""
    stage = load_model(checkpoint, model, sequence_length=PROMPT_TOKENS)
    return logits_difference(expected, partial(causal_logits, stage), model.vocab_size)


def logits_difference(expected: Logits, ours: Logits, vocab_size: int) -> dict[str, Any]:
    """Largest difference of two functions' logits on fixed prompts, beside the largest logit."""
    difference = largest = 0.0
    for prompt, stride in enumerate(STRIDES):
        generator = torch.Generator().manual_seed(prompt)
        tokens = torch.randint(vocab_size, (PROMPT_TOKENS,), generator=generator)
        positions = stride * torch.arange(PROMPT_TOKENS)
        with torch.no_grad():
            wanted, found = expected(tokens, positions), ours(tokens, positions)
        difference = max(difference, float((found - wanted).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
    return {
        "compared": True,
        "max_difference": difference,
        "max_logit": largest,
        "tokens": len(STRIDES) * PROMPT_TOKENS,
    }


def causal_logits(stage: BlockDiffusionStage, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    """fp32 [S, vocabulary] of int64 tokens [S] at positions [S] (None: 0..S-1), causal, on the host."""
    S, at = len(tokens), device.device()
    mask = BlockDiffusionMask([torch.tensor([0, S])], 1, clean_copy=False, causal=True)
    rows = torch.arange(S, device=at)
    positions = rows if positions is None else positions.to(at)
    inputs = ModelInputs(tokens[None].to(at), positions[None], ContextShard(mask), rows, readout=LOGITS)
    return stage(inputs).float().cpu()


def _stage(model: ModelConfig, *, sequence_length: int) -> BlockDiffusionStage:
    config = Config(
        model=replace(model, layer_spec=LayerSpec.local), data=DataConfig(sequence_length=sequence_length)
    )
    return build_stage(config, initialize=False)


def _sharded(stage: BlockDiffusionStage, *, of_gradients: bool = False) -> list[tuple[str, Any, Any, Tensor]]:
    """(key, shape, offset, data) of every part that the model would save."""
    sharded = stage.sharded_state_dict(metadata=SHARDING_METADATA)
    if of_gradients:
        for entry in nested_values(sharded):
            parameter = entry.data
            entry.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    apply_factories(sharded)
    parts = [entry for entry in nested_values(sharded) if isinstance(entry, ShardedTensor)]
    return [(part.key, tuple(part.global_shape), part.global_offset, part.data) for part in parts]
