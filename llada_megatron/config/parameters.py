"""Parameters of a whole model and of its checkpoint; the formulas are the families'."""

from __future__ import annotations

from dataclasses import replace

from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import LayoutConfig, LoraConfig, ModelConfig, PrecisionConfig

BYTES = {"fp32": 4, "bf16": 2}
"""Of a number, by precision.dtype."""


def total_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, expert_bias included, as checkpoints count them."""
    formulas = formulas_of(model)
    whole = formulas.parameters(model, *formulas.stage_contents(model, LayoutConfig()))
    return whole.trained + whole.frozen + whole.bias


def active_parameters(model: ModelConfig) -> int:
    """Parameters that one token has to do with: all but the routed experts that it does not choose."""
    if not model.has_experts:
        return total_parameters(model)
    formulas, adapters = formulas_of(model), model.lora
    parts = [model] if not adapters.rank else [model, replace(model, lora=LoraConfig())]
    experts = sum(
        formulas.parameters(part, *formulas.stage_contents(part, LayoutConfig())).expert for part in parts
    )
    return total_parameters(model) - experts // model.experts * (model.experts - model.experts_per_token)


def checkpoint_bytes(model: ModelConfig, precision: PrecisionConfig, *, averages: bool = False) -> int:
    """Of a training checkpoint: weights, and fp32 masters and two moments of those that are trained.

    averages: and their moving average (training.ema_decay), fp32 too.
    """
    formulas = formulas_of(model)
    frozen = formulas.parameters(model, *formulas.stage_contents(model, LayoutConfig())).frozen
    total = total_parameters(model)
    return total * BYTES[precision.dtype] + (16 if averages else 12) * (total - frozen)


def cached_token_bytes(model: ModelConfig, precision: PrecisionConfig, layout: LayoutConfig) -> int:
    """What decoding keeps of a token on each rank: keys and values, of the rank's heads alone where each head
    has its own."""
    return formulas_of(model).kept_numbers(model, layout.tp) * BYTES[precision.dtype]
