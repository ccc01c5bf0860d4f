"""Next tokens, and the global parser's loss: what the family `dlcm` learns (arXiv 2512.24617).

With p and b of the tokens of the global batch, G the mean of p, F of b, and R tokens_per_concept:

    loss = CE + parser_weight * (R/(R-1) ((R-1) F G + (1-F)(1-G)) - 1)

b is drawn, so F has no gradient, and the loss is linear in G with a slope that F alone decides:

    R/(R-1) (R F - 1) G + R/(R-1) (1-F) - 1

So it is a sum over tokens divided by their number, like the cross entropy, once F is known: from the one
micro-batch that each rank has, else from a pass of the encoder over all of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.config.schedule import Stage
from llada_megatron.data.packed import PackedSequences
from llada_megatron.model.concepts import parser_loss, parser_slope
from llada_megatron.model.dlcm import BOUNDARIES, PARSED
from llada_megatron.objectives.autoregressive import Autoregressive, autoregressive_batch
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.objective import Loss
from llada_megatron.parallel.random import Purpose, generator


class Concepts(Autoregressive):
    """The mean cross entropy of next tokens beside the parser's loss over the global batch."""

    readout = PARSED
    statistics_readout = BOUNDARIES

    def batch(self, data: PackedSequences, indices: list[int], stage: Stage, **unused: Any) -> MicroBatch:
        """Next-token prediction inside documents, with a draw for each token's boundary."""
        samples = self.read(data, indices)
        batch = autoregressive_batch(samples)
        B, S = batch.inputs.tokens.shape
        seed = self.config.run.seed
        draws = [generator(seed, Purpose.BOUNDARY, index).random(S, dtype="float32") for index in indices]
        batch.inputs.draws = torch.stack([torch.from_numpy(each) for each in draws])
        left_out = [sample.is_left_out for sample in samples]
        batch.whole["left_out"] = torch.tensor(left_out)
        batch.counts = (*batch.counts, S * (B - sum(left_out)))
        return batch

    def statistics(self, batch: MicroBatch, output: torch.Tensor) -> torch.Tensor:
        """Tokens that open a concept, and tokens, of a micro-batch: fp64 [2]."""
        opened_B, _ = output.double().chunk(2)
        tokens = torch.full_like(opened_B, batch.inputs.tokens.shape[1])
        return torch.stack([opened_B, tokens]).masked_fill(batch.whole["left_out"], 0).sum(dim=-1)

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """output: cross entropies [N], then opened and expected boundaries of each sample, [2B]."""
        settings, left_out = self.config.model.concepts, batch.whole["left_out"]
        B, S = batch.inputs.tokens.shape
        cross_entropy, sums_2B = output.split([len(output) - 2 * B, 2 * B])
        opened_B, expected_B = sums_2B.chunk(2)
        F = self._rate(batch, sums_2B.detach())
        R, tokens = settings.tokens_per_concept, batch.counts[1]
        expected = expected_B.masked_fill(left_out, 0).sum()
        parser = parser_slope(F, R) * expected + parser_loss(F, 0.0, R) * tokens
        figures = {
            name: (left_out.long(), sums_B.detach() / S)
            for name, sums_B in (("boundary_rate", opened_B), ("boundary_probability", expected_B))
        }
        return Loss([cross_entropy.sum(), settings.parser_weight * parser], batch.counts, figures)

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """F, G, and the tokens of a concept, which are 1/F."""
        figures: dict[str, Any] = {name: values[0] for name, values in means.items()}
        rate = figures["boundary_rate"]
        return {**figures, "tokens_per_concept": 1 / rate if rate else None}

    def _rate(self, batch: MicroBatch, sums_2B: torch.Tensor) -> torch.Tensor:
        """F, fp32 scalar, over the global batch."""
        counted = self.summed
        if counted is None:
            counted = self.statistics(batch, sums_2B)
            dist.all_reduce(counted, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        opened, tokens = counted.to(sums_2B.device)
        return (opened / tokens.clamp(min=1)).float()


OBJECTIVE = Concepts
