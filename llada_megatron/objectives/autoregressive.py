"""Next-token prediction: the model that a conversion starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llada_megatron.attention.context import ContextShard
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import BlockGrid
from llada_megatron.data.packed import PackedSample, PackedSequences
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.objectives.batch import MicroBatch, flat_outputs, model_mask
from llada_megatron.objectives.objective import Loss, Objective


class Autoregressive(Objective):
    """The mean cross entropy of all tokens but the first of each document; in chats, of the answers."""

    def batch(self, data: PackedSequences, indices: list[int], stage: Stage, **unused: Any) -> MicroBatch:
        """Next-token prediction inside documents."""
        return autoregressive_batch(self.read(data, indices))

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """Sum of the cross entropies [N]."""
        return Loss([(output * batch.rows["weights"]).sum()], batch.counts)


def autoregressive_batch(samples: list[PackedSample]) -> MicroBatch:
    """Next-token prediction inside documents; the first token of a document is predicted by nothing."""
    rows, labels = [], []
    for sample in samples:
        row = np.setdiff1d(np.arange(len(sample.tokens)), sample.cu_seqlens[1:] - 1)
        if sample.supervised is not None:
            row = row[sample.supervised[row + 1]]
        row = row[:0] if sample.is_left_out else row
        rows.append(row)
        labels.append(sample.tokens[row + 1])
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    count = sum(len(row) for row in rows)
    inputs = ModelInputs(
        tokens=tokens,
        positions=torch.arange(tokens.shape[1])[None],
        keys=ContextShard(model_mask(samples, 1, BlockGrid.sequence, clean_copy=False, causal=True)),
        outputs=flat_outputs(rows),
        labels=torch.from_numpy(np.concatenate(labels)),
    )
    return MicroBatch(inputs, {"weights": torch.ones(count)}, (count,))


OBJECTIVE = Autoregressive
