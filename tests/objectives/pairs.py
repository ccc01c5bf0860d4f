"""An objective whose loss is no sum over rows: a preference between the two samples of a pair.

-log sigmoid(margin), margin = score of the first sample less that of the second, score = -sum of its weighted
cross entropies, which may lie on several context-parallel ranks. The denominator counts pairs.
"""

from typing import Any

import torch
import torch.nn.functional as F

from llada_megatron.config.objectives import Figure, Geometry
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.objective import Loss
from llada_megatron.objectives.passes import counted_once, sum_over_context

GEOMETRY = Geometry(
    module=__name__,
    causal=False,
    reads_clean_half=True,
    supervised=lambda diffusion, length: length / 2,
    figures={"margin": Figure(1)},
)


class Pairs(Diffusion):
    def batch(self, *args: Any, **kwargs: Any) -> MicroBatch:
        batch = super().batch(*args, **kwargs)
        assert batch.inputs.tokens.shape[0] == 2, "a pair is a micro-batch"
        batch.counts = (1,)
        batch.rows = {"weights": batch.rows["weights"], "sample": batch.inputs.outputs % 2}
        return batch

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        weighted = output * batch.rows["weights"] / 100
        scores = sum_over_context(-output.new_zeros(2).index_add(0, batch.rows["sample"], weighted))
        margin = scores[0] - scores[1]
        loss = counted_once(-F.logsigmoid(margin))
        first = torch.zeros(1, dtype=torch.int64)
        return Loss(
            [loss], batch.counts, {"margin": (first[: batch.counts[0]], margin[None][: batch.counts[0]])}
        )

    def shown(self, stage: Any, means: dict[str, Any]) -> dict[str, Any]:
        return {"margin": means["margin"][0]}


OBJECTIVE = Pairs
