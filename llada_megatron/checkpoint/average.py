"""The exponential moving average of the weights: each rank averages the run of masters that it updates.

    average <- decay * average + (1 - decay) * master     after every step that changed the weights

It begins as the weights that a run starts with. A tensor that is not trained (expert biases, what is frozen)
has none. In a checkpoint it lies in `ema/`, under the names of the weights, in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer

from llada_megatron.checkpoint import moments
from llada_megatron.checkpoint.merge import parts_in
from llada_megatron.checkpoint.shards import ShardsReader, ShardsWriter
from llada_megatron.config.errors import BadInput
from llada_megatron.record.run_dir import EMA, SHARDS


class WeightAverage:
    """Average of what this rank's optimizer updates: fp32, 4 bytes for each element of its masters."""

    def __init__(self, optimizer: MegatronOptimizer, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        self._masters = [
            parameter
            for part in moments.parts_of(optimizer)
            for group in part.optimizer.param_groups
            for parameter in group["params"]
        ]
        self.values = [torch.empty_like(each, dtype=torch.float32) for each in self._masters]
        self._of = {id(master): average for master, average in zip(self._masters, self.values, strict=True)}
        self.restart()

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are."""
        torch._foreach_copy_(self.values, self._masters)

    @torch.no_grad()
    def update(self) -> None:
        """After a step that changed the weights."""
        torch._foreach_lerp_(self.values, self._masters, 1 - self.decay)

    def held_here(self, sharded_model: dict[str, Any]) -> Iterator[moments.Held]:
        """This rank's averages by the names and places of the weights; see moments.held_here."""
        for entry, state, first in moments.runs_of(sharded_model, self.optimizer):
            yield from moments.boxes_of("", entry, self._of[id(state[moments.MASTER])], first)


def write_averaged(source: Path, shards: Path) -> None:
    """Write a checkpoint's averaged weights into the new directory `shards`, all in fp32.

    What has no average is taken as it is. Raises BadInput where the run kept none.
    """
    if not (source / EMA).is_dir():
        raise BadInput(f"{source} holds no averaged weights: train with training.ema_decay=0.9999, say.")
    weights, averages = ShardsReader(source / SHARDS), ShardsReader(source / EMA)
    averaged = averages.shapes()
    writer = ShardsWriter(shards)
    for part in parts_in(weights.shapes()):
        reader = averages if part.name in averaged else weights
        writer.write(part, reader.read(part).float())
    writer.finish()
