"""Confidence-aware parallel training: the diffusion loss, and low entropy where the model is right.

    loss = diffusion loss + weight * mean over {masked i : argmax p_i = x_0[i]} of H(softmax(z_i /
    temperature))

(LLaDA2.0, arXiv 2512.15745, eq. 6; dParallel, arXiv 2509.26488). The mean is over the global batch, both
views of a complementary pair included; which predictions are right carries no gradient, and when none is,
the term is zero.
"""

from __future__ import annotations

from typing import Any

import torch

from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config
from llada_megatron.model.readout import confidence
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.diffusion import Diffusion, readout_of
from llada_megatron.objectives.objective import Loss


class Confidence(Diffusion):
    """The diffusion loss over its denominator, the entropies over the number of right predictions."""

    counts_known = False

    def __init__(self, name: str, config: Config, schedule: Schedule) -> None:
        super().__init__(name, config, schedule)
        self.readout = readout_of(confidence(config.confidence.temperature), config)

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """output fp32 [N, 3]: cross entropy, entropy, and whether the prediction is right."""
        cross_entropy, entropy, is_right = output.unbind(-1)
        is_right = is_right.detach()
        diffusion = super().loss(batch, cross_entropy)
        first = torch.zeros_like(is_right, dtype=torch.int64)
        return Loss(
            [diffusion.sums[0], self.config.confidence.weight * (entropy * is_right).sum()],
            [diffusion.counts[0], is_right.sum()],
            {**diffusion.figures, "right": (first, is_right), "entropy": (first, entropy)},
        )

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """`right`: the share of masked tokens whose prediction is right; `entropy`: their mean entropy."""
        return {**super().shown(stage, means), "right": means["right"][0], "entropy": means["entropy"][0]}


OBJECTIVE = Confidence
