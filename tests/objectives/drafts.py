"""An objective that wants a pass before its own: the model's drafts stand where tokens were masked."""

from typing import Any

import torch

from llada_megatron.config.objectives import Geometry
from llada_megatron.model.readout import TOP_ONE
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.objective import Loss

GEOMETRY = Geometry(
    module=__name__,
    causal=False,
    reads_clean_half=True,
    supervised=lambda diffusion, length: length / 2,
    passes_before=lambda config, micro_batches: 1,
)


class Drafts(Diffusion):
    draft_readout = TOP_ONE

    def batch(self, *args: Any, draft: torch.Tensor | None = None, **kwargs: Any) -> MicroBatch:
        batch = super().batch(*args, **kwargs)
        if draft is not None:
            row, sample = (
                batch.inputs.outputs // len(batch.inputs.tokens),
                batch.inputs.outputs % len(batch.inputs.tokens),
            )
            batch.inputs.tokens[sample, row] = draft[:, 0].long()
        return batch

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        return Loss([output.sum()], batch.counts)

    def shown(self, stage: Any, means: dict[str, Any]) -> dict[str, Any]:
        return {}


OBJECTIVE = Drafts
