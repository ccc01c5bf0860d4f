"""Rotary frequencies of a model whose context was made longer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.choices import RotaryScaling
from llada_megatron.config.ranges import Amount, Count, Factor, Range


@dataclass
class RotaryScalingConfig:
    """Rotary frequencies for longer contexts: each is kept, divided by `factor`, or in between by `type`.

    Formulas in model/rotary.py; the names of config.json are in docs/conversion.md.
    """

    type: RotaryScaling = RotaryScaling.none
    factor: Annotated[float, Range(at_least=1, at_most=1e6)] = 1.0
    """How many times longer the context is than that of pretraining."""
    original_positions: Count = 0
    """The longest position of pretraining, of yarn and llama3."""
    beta_fast: Factor = 32.0
    """yarn: frequencies that turn more often than this within original_positions are kept."""
    beta_slow: Factor = 1.0
    """yarn: those that turn less often are divided by `factor`."""
    truncate: bool = True
    """yarn: whether the channels at these two limits are rounded to whole ones."""
    attention_factor: Amount = 0.0
    """yarn: cosines and sines are multiplied by this; 0: by 0.1 ln(factor) + 1."""
    low_freq_factor: Factor = 1.0
    """llama3: frequencies that turn less often within original_positions are divided by `factor`."""
    high_freq_factor: Factor = 4.0
    """llama3: those that turn more often are kept."""
    mscale_all_dim: Amount = 0.0
    """yarn with model.mla: softmax's scale is multiplied by (0.1 mscale_all_dim ln(factor) + 1)^2, as in
    DeepSeek-V3."""
