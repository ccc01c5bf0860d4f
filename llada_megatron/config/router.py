"""What keeps the routers of experts in bounds beside their bias (docs/experts.md)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from llada_megatron.config.ranges import Amount, Range


@dataclass
class RouterConfig:
    """Guards and losses of the routers; with its defaults a router does what the model says alone."""

    z_loss: Amount = 0.0
    """Of each layer's mean squared log-sum-exp of the router's logits, which keeps them small (ST-MoE); Ling
    2.0 pretrained with 3.5e-6."""
    sequence_balance: Amount = 0.0
    """Of each layer's mean over sequences of how unevenly one uses the experts, DeepSeek-V3's complement to
    the bias, which sees the global batch alone; theirs is 1e-4."""
    rows_cap: Annotated[float, Range(at_least=0, at_most=1e6)] = 0.0
    """In training a rank's experts take at most so many times their mean of a micro-batch's rows, from each
    rank that sends; the assignments of the lowest weight are dropped. At least 1; 0: all are taken."""

    @property
    def has_losses(self) -> bool:
        """Whether a router learns from something besides the model's loss."""
        return self.z_loss > 0 or self.sequence_balance > 0
