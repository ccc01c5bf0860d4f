"""A training step with a stopwatch: what is handed into it instead of what training uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.objective import Loss, Objective
from llada_megatron.runtime import device
from llada_megatron.training.step import Trainer, onto_device, train_step


class Stopwatch:
    """Adds up the seconds spent in its laps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def lap(self, name: str = "") -> Iterator[None]:
        """One lap; `name` is for whoever wants to know what runs."""
        began = device.seconds()
        try:
            yield
        finally:
            self.seconds += device.seconds() - began


class Timed(Objective):
    """An objective whose losses are timed; its batches are built beside the model (training/ahead.py)."""

    def __init__(
        self, timed: Objective, stopwatch: Stopwatch, change: Callable[[MicroBatch], MicroBatch]
    ) -> None:
        self.timed, self.stopwatch, self.change = timed, stopwatch, change
        self.config, self.geometry, self.readout = timed.config, timed.geometry, timed.readout
        self.draft_readout, self.counts_known = timed.draft_readout, timed.counts_known
        self.draft_turns = timed.draft_turns
        self.noise_over_rms, self.shown = timed.noise_over_rms, timed.shown  # type: ignore[method-assign]
        self.draft_batch = timed.draft_batch  # type: ignore[method-assign]

    def batch(self, *args: Any, **kwargs: Any) -> MicroBatch:
        """The objective's, changed."""
        return self.change(self.timed.batch(*args, **kwargs))

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """The objective's."""
        with self.stopwatch.lap():
            return self.timed.loss(batch, output)


def on_every_row(batch: MicroBatch) -> MicroBatch:
    """The head as stock models use it: on all rows, the loss on some of them."""
    inputs, N = batch.inputs, batch.inputs.tokens.numel()

    def spread(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(N).index_copy_(0, inputs.outputs, values)

    assert inputs.labels is not None
    spread_inputs = replace(
        inputs, labels=spread(inputs.labels), outputs=torch.arange(N), noisy_outputs=False
    )
    return replace(
        batch, inputs=spread_inputs, rows={name: spread(rows) for name, rows in batch.rows.items()}
    )


def _as_it_is(batch: MicroBatch) -> MicroBatch:
    return batch


def with_clean_rows(batch: MicroBatch) -> MicroBatch:
    """The clean half passes all of the last layer, as if something read it there."""
    return replace(batch, inputs=replace(batch.inputs, noisy_outputs=False))


def timed_step(
    trainer: Trainer, step: int, *, full_logits: bool, clean_rows: bool = False
) -> tuple[float, float]:
    """Seconds of one step, and of its part outside megatron-core's passes and optimizer: losses, and what is
    waited for batches, among it.

    `full_logits`: the head is applied to every row, in one piece. `clean_rows`: see `with_clean_rows`.
    """
    inside, ours = Stopwatch(), Stopwatch()

    def waited_for(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        here = onto_device(batches)

        def one() -> MicroBatch | None:
            with ours.lap():
                return next(here, None)

        return iter(one, None)

    stage = trainer.model[0].module
    change = on_every_row if full_logits else with_clean_rows if clean_rows else _as_it_is
    objectives = {name: Timed(objective, ours, change) for name, objective in trainer.objectives.items()}
    chunk_tokens = stage.head_chunk_tokens
    if full_logits:
        stage.head_chunk_tokens = 1 << 30
    began = device.seconds()
    train_step(replace(trainer, objectives=objectives, section=inside.lap, onto_device=waited_for), step)
    seconds = device.seconds() - began
    stage.head_chunk_tokens = chunk_tokens
    return seconds, seconds - (inside.seconds - ours.seconds)
