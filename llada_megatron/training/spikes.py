"""Steps whose loss or gradient norm stands far out of what was usual lately: found alike on every rank."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field

from llada_megatron.config.schema import TrainingConfig


@dataclass
class Spikes:
    """Loss and gradient norm of the stage's last steps that were learnt from, the same on every rank."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)

    def found(self, settings: TrainingConfig, loss: float, grad_norm: float) -> str:
        """What is wrong with a step, as a clause; empty where nothing is, or too little is known to tell."""
        for name, value, before, most in (
            ("loss", loss, self.losses, settings.max_loss_over_median),
            ("gradient norm", grad_norm, self.grad_norms, settings.max_grad_norm_over_median),
        ):
            if not most or len(before) < settings.spike_window_steps:
                continue
            usual = statistics.median_low(before)
            if value > most * usual > 0:
                return f"its {name} of {value:.4g} is {value / usual:.1f} times the median of {usual:.4g}"
        return ""

    def learnt(self, settings: TrainingConfig, loss: float, grad_norm: float) -> None:
        """Count a step that changed the weights."""
        if settings.max_loss_over_median or settings.max_grad_norm_over_median:
            window = settings.spike_window_steps
            self.losses = [*self.losses, loss][-window:]
            self.grad_norms = [*self.grad_norms, grad_norm][-window:]

    def clear(self) -> None:
        """Forget what was usual: another stage has another loss."""
        self.losses, self.grad_norms = [], []
