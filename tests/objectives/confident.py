"""An objective with two denominators: cross entropies over maskable tokens, entropies over right ones.

How many are right is known once the model has run, and over the global batch only when all of it has.
"""

from typing import Any

import torch

from llada_megatron.config.objectives import Geometry
from llada_megatron.model.readout import CONFIDENCE
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.objective import Loss

GEOMETRY = Geometry(
    module=__name__,
    causal=False,
    reads_clean_half=True,
    supervised=lambda diffusion, length: length / 2,
    denominators=2,
)


class Confident(Diffusion):
    readout = CONFIDENCE
    counts_known = False

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        cross_entropy, entropy, is_right = output.unbind(-1)
        return Loss(
            [(cross_entropy * batch.rows["weights"]).sum(), (entropy * is_right).sum()],
            [batch.counts[0], is_right.sum()],
        )

    def shown(self, stage: Any, means: dict[str, Any]) -> dict[str, Any]:
        return {}


OBJECTIVE = Confident
