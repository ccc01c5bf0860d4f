"""What an objective is: batches from samples, the readout it asks for, and its loss.

A step is one pass of micro-batches forward and backward (training/step.py); an objective decides what is in
them and what comes out. Its geometry, which needs no torch, is in config/objectives.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llada_megatron.config.choices import BadSamples
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import BadSample, PackedSample, PackedSequences
from llada_megatron.model.readout import CROSS_ENTROPY, Readout
from llada_megatron.objectives.batch import MicroBatch, Samples, left_out, read_sample


@dataclass
class Loss:
    """What this rank's part of a micro-batch adds to the loss, sum over k of sums[k] / counts[k].

    Both are summed over the global batch, the context-parallel parts included, before they are divided.
    """

    sums: Sequence[torch.Tensor]
    """One differentiable scalar for each of the objective's denominators."""
    counts: Sequence[int | torch.Tensor]
    figures: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """By name the bin, int64 [N], and the value [N] of each supervised row."""


class Objective:
    """Base of all objectives. One object serves all stages of a run that name it."""

    readout: Readout = CROSS_ENTROPY
    draft_readout: Readout | None = None
    """Asks for a pass without gradients before the step's own: of `draft_batch`, read out by this. Every rank
    then gets the result of a whole micro-batch, on the host, as `draft` of `batch`."""
    draft_turns = 1
    """So many in a row: each later one gets what the one before made, as `draft` of `draft_batch`."""
    statistics_readout: Readout | None = None
    """Asks, where a rank has several micro-batches, for one pass more without gradients, read out by this.
    What `statistics` makes of it is summed over the global batch, for a loss that needs the sums first."""
    counts_known = True
    """Whether `MicroBatch.counts` says the denominators before the model has run. An objective with several
    denominators that it only knows afterwards costs a forward pass more, in which they are counted."""

    def __init__(self, name: str, config: Config, schedule: Schedule) -> None:
        self.config, self.schedule = config, schedule
        self.geometry = OBJECTIVES[name]
        self.left_out: dict[int, str] = {}
        """Why sequences of this rank were left out since somebody last looked, by their index in the data."""
        self.summed: torch.Tensor | None = None
        """`statistics` over the step's global batch, fp64 on the host; None where each rank has one
        micro-batch: the loss sums them up."""
        self.identity: Mapping[str, Any] = {}
        """What it has read besides the data, in plain JSON: checkpoints keep it, a resume brings it back."""

    def open(self, stage: Stage) -> None:
        """Read what the stage that a run starts in needs besides the data; BadInput where it does not fit."""

    def batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """The micro-batch of these global sample indices, whole and on the host.

        A function of the data, the run's seed and the indices alone, and of the draft where there is one:
        layout, micro-batch and resume cannot change a sample.
        """
        raise NotImplementedError

    def draft_batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """What a pass before the step's own reads: by default what `batch` makes of the same draft."""
        return self.batch(data, indices, stage, noise_sigma=noise_sigma, draft=draft)

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """The loss of this rank's part of a micro-batch; output: what `readout` gives for its N rows.

        A term that is no sum over rows adds up its parts with `sum_over_context` first, and is then itself
        `counted_once` (objectives/passes.py): rows of a sequence may lie on several ranks.
        """
        raise NotImplementedError

    def statistics(self, batch: MicroBatch, output: torch.Tensor) -> torch.Tensor:
        """fp64 numbers of a micro-batch, from what `statistics_readout` gives."""
        raise NotImplementedError

    def noise_over_rms(self, step: int) -> float:
        """Standard deviation of the noise on masked tokens' embeddings at a step, over their entries' RMS."""
        return 0.0

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """A step's figures for its record, from the means in every bin; None where nothing was counted."""
        return dict(means)

    def held_out(
        self, model: Sequence[torch.nn.Module], samples: Sequence[PackedSample], stage: Stage
    ) -> dict[str, dict[str, float | None]]:
        """Figures of held-out sequences besides the bound, `mean` and `se` by name; every rank calls it."""
        return {}

    def sequences(self, indices: Sequence[int]) -> list[int]:
        """The sequence of the data that each of these samples is made of."""
        each = self.geometry.samples_per_sequence(self.config)
        return [index // each for index in indices]

    def read(self, data: Samples, indices: Sequence[int]) -> list[PackedSample]:
        """The sequences of these samples; one that cannot be trained on is `is_left_out`, or BadSample.

        As training.bad_samples says. From what is left out `batch` supervises nothing, and counts nothing.
        """
        return [self._read(data, sequence) for sequence in self.sequences(indices)]

    def _read(self, data: Samples, sequence: int) -> PackedSample:
        try:
            return read_sample(data, sequence, self.config.model.vocab_size)
        except BadSample as fault:
            if self.config.training.bad_samples is BadSamples.refuse or fault.sample is None:
                raise
            self.left_out[sequence] = str(fault)
            return left_out(fault.sample, self.config.model)
