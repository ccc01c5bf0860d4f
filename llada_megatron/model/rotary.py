"""Rotary embedding: the frequencies of model.rotary_scaling, at explicit positions.

    f_i = base^(-2i/C)            of channel pair i < C/2, C channels that are rotated
    f_i keep_i + f_i (1 - keep_i) / factor

    linear   keep_i = 0
    llama3   turns_i between low_freq_factor and high_freq_factor, as a share of the way (Llama 3.1)
    yarn     1 - i's share of the way between the pairs that turn beta_fast and beta_slow times (Peng et al.,
             arXiv 2309.00071), and cosines and sines times attention_factor

where turns_i = original_positions f_i / 2 pi. Frequencies are fp32, as in the public code.
"""

from __future__ import annotations

import math

import torch
from megatron.core.transformer.attention import Attention
from torch import Tensor

from llada_megatron.config.schema import ModelConfig, RotaryScaling, RotaryScalingConfig
from llada_megatron.model.mla import LatentAttention
from llada_megatron.runtime import device


def inverse_frequencies(model: ModelConfig, at: torch.device) -> Tensor:
    """fp32 [C/2]: radians per position of each pair of channels, on a device."""
    channels = model.rotated_channels
    exponents = torch.arange(0, channels, 2, dtype=torch.float32, device=at) / channels
    frequencies = 1.0 / model.rotary_base**exponents
    if model.rotary_scaling.type is RotaryScaling.none:
        return frequencies
    keep = _kept(model, frequencies, channels)
    return frequencies * keep + frequencies / model.rotary_scaling.factor * (1 - keep)


def attention_factor(scaling: RotaryScalingConfig) -> float:
    """What cosines and sines are multiplied by."""
    if scaling.type is not RotaryScaling.yarn:
        return 1.0
    return scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def softmax_factor(scaling: RotaryScalingConfig) -> float:
    """What softmax's scale is multiplied by."""
    return (0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1) ** 2


def _kept(model: ModelConfig, frequencies: Tensor, channels: int) -> Tensor:
    """fp32 [C/2] in [0, 1]: how far each frequency stays what it was."""
    scaling = model.rotary_scaling
    if scaling.type is RotaryScaling.linear:
        return torch.zeros_like(frequencies)
    if scaling.type is RotaryScaling.llama3:
        turns = scaling.original_positions * frequencies / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        return ((turns - low) / (high - low)).clamp(0, 1)

    def pair_that_turns(times: float) -> float:
        positions_per_turn = scaling.original_positions / (2 * math.pi * times)
        return channels / 2 * math.log(positions_per_turn) / math.log(model.rotary_base)

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)  # of channels, not pairs, as in the public code
    if first == last:
        last += 0.001
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device=frequencies.device)
    return 1 - ((pairs - first) / (last - first)).clamp(0, 1)


class ExplicitRotary(torch.nn.Module):
    """Stands in for GPTModel.rotary_pos_emb, which knows only 0..S-1 and a zig-zag slice of it."""

    def __init__(self) -> None:
        super().__init__()
        # No buffer: Float16Module would round it to bf16, and angles at position 4000 by half a radian.
        self.inv_freq: Tensor | None = None
        """fp32 [C/2], as `set_frequencies` says."""

    def forward(self, positions: Tensor) -> Tensor:
        """Angles fp32 [S, B or 1, 1, channels] of positions int64 [B or 1, S]."""
        assert self.inv_freq is not None
        angles = positions.T.to(self.inv_freq.device).float()[..., None] * self.inv_freq
        return torch.cat([angles, angles], dim=-1)[:, :, None]


def set_frequencies(stage: torch.nn.Module, model: ModelConfig) -> None:
    """Have a pipeline stage rotate as a model says: at first, and where a stage of the schedule has its own.

    The factor of cosines and sines is an attribute of megatron-core's attention (attention.py:326 in 0.19.2),
    which it would set from YaRN's terms alone.
    """
    for module in stage.modules():
        if isinstance(module, ExplicitRotary):
            module.inv_freq = inverse_frequencies(model, device.device())
        elif isinstance(module, LatentAttention):
            scaling = model.rotary_scaling
            module.set_scales(rotary=attention_factor(scaling), softmax=softmax_factor(scaling))
        elif isinstance(module, Attention):
            module._yarn_concentration_factor = attention_factor(model.rotary_scaling)
