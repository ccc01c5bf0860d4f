"""Next tokens, and the global parser's loss: what the family `dlcm` learns (arXiv 2512.24617).

With p and b of the tokens of the global batch, G the mean of p, F of b, and R tokens_per_concept:

    loss = CE + parser_weight * (R/(R-1) ((R-1) F G + (1-F)(1-G)) - 1)

b is drawn, so F has no gradient, and the loss is linear in G with a slope that F alone decides:

    R/(R-1) (R F - 1) G + R/(R-1) (1-F) - 1

So it is a sum over tokens divided by their number, like the cross entropy, once F is known: from the one
micro-batch that each rank has, else from a pass of the encoder over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.config.schedule import Stage
from llada_megatron.data.packed import PackedSample, PackedSequences
from llada_megatron.data.shards import domains
from llada_megatron.model.concepts import parser_loss, parser_slope
from llada_megatron.model.dlcm import BOUNDARIES, PARSED
from llada_megatron.objectives import passes
from llada_megatron.objectives.autoregressive import Autoregressive, autoregressive_batch
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.objective import Loss
from llada_megatron.parallel.dealing import even_parts
from llada_megatron.parallel.random import Purpose, generator
from llada_megatron.parallel.ranks import gathered
from llada_megatron.runtime import device


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

    def held_out(
        self, model: Sequence[torch.nn.Module], samples: Sequence[PackedSample], stage: Stage
    ) -> dict[str, dict[str, float | None]]:
        """Tokens per concept by the rule p >= 0.5, of all sequences and of each corpus."""
        parts = even_parts(len(samples), stage.micro_batch)

        def batches() -> Iterator[MicroBatch]:
            for part in parts:
                batch = autoregressive_batch([samples[index] for index in part])
                batch.inputs.readout = BOUNDARIES
                yield batch.to(device.device())

        counted = passes.forward_only(
            model,
            [batches() for _ in model],
            lambda batch, output: output.double().chunk(2)[0],
            num_microbatches=len(parts),
            seq_length=stage.sequence_length,
            micro_batch_size=stage.micro_batch,
        )
        mine = [
            pair
            for part, opened_B in zip(parts, counted, strict=True)
            for pair in zip(part, opened_B.tolist(), strict=True)
        ]
        opened = dict(pair for pairs in gathered(mine) for pair in pairs)
        names = domains([sample.corpus for sample in samples])
        L, found = stage.sequence_length, {"tokens_per_concept": [*opened.values()]}
        for corpus, name in sorted(names.items()) if len(names) > 1 else []:
            own = [opened[index] for index, sample in enumerate(samples) if sample.corpus == corpus]
            found[f"tokens_per_concept of {name}"] = own
        return {name: _estimate(L, counts) for name, counts in found.items()}

    def _rate(self, batch: MicroBatch, sums_2B: torch.Tensor) -> torch.Tensor:
        """F, fp32 scalar, over the global batch."""
        counted = self.summed
        if counted is None:
            counted = self.statistics(batch, sums_2B)
            dist.all_reduce(counted, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        opened, tokens = counted.to(sums_2B.device)
        return (opened / tokens.clamp(min=1)).float()


def _estimate(tokens: int, opened: Sequence[float]) -> dict[str, float | None]:
    """Tokens of all sequences over their concepts, and its standard error over sequences."""
    mean = tokens * len(opened) / sum(opened)
    spread = math.sqrt(sum((tokens - mean * count) ** 2 for count in opened)) / sum(opened)  # of a ratio
    return {"mean": mean, "se": spread if len(opened) > 1 else None}


OBJECTIVE = Concepts
