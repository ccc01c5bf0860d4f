"""On-policy training: the model's own drafts where masks were, and every token as a target (DMax's OPUT).

One forward without gradients fills the masked positions with the most probable token; the step's own forward
reads what came out, and the loss is the mean cross entropy over all positions that may be masked (DMax, arXiv
2604.08302). With several turns each later forward reads the draft before it and drafts the same positions
anew, as LLaDA2.1's multi-turn forward may do, of which no more is published.

The noisy half may so hold wrong tokens that look right to the model: those that it has to learn to edit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSequences
from llada_megatron.model.readout import choice
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.editing import maskable
from llada_megatron.objectives.objective import Loss
from llada_megatron.parallel.random import Purpose, generator

MASKED, DRAFTED, KEPT = range(3)
"""What a row with a loss reads, in `MicroBatch.rows["stands"]`."""


class Oput(Diffusion):
    """The mean cross entropy of all tokens that may be masked, of which the model drafted some."""

    def __init__(self, name: str, config: Config, schedule: Schedule) -> None:
        super().__init__(name, config, schedule)
        self.draft_readout = choice(config.model.mask_token_id)
        self.draft_turns = config.diffusion.oput.turns

    def draft_batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """What objective `diffusion` reads, in later turns with the draft before them where masks were."""
        batch = super().batch(data, indices, stage, noise_sigma=noise_sigma)
        if draft is not None:
            batch.inputs.tokens = with_draft(batch.inputs.tokens, batch.inputs.outputs, draft[:, 0])
            batch.inputs.noise = None
        return batch

    def batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """`[x_t ; x_0]`, x_t as the draft fills it; without one, and in samples that get none, masked."""
        samples = self.read(data, indices)
        masks = self.corruptions(samples, indices, stage)
        is_drafted = [draft is not None and self._is_drafted(index) for index in indices]
        masked = self.corrupted(samples, masks, stage.block_size).inputs
        tokens = masked.tokens
        if draft is not None:
            here = torch.from_numpy(np.flatnonzero(np.array(is_drafted)[masked.outputs % len(samples)]))
            tokens = with_draft(tokens, masked.outputs[here], draft[here, 0])
        learnt = [maskable(sample) for sample in samples]
        batch = self.corrupted(
            samples,
            [
                Corruption(rows, np.ones(len(rows)), mask.group_starts)
                for mask, rows in zip(masks, learnt, strict=True)
            ],
            stage.block_size,
        )
        batch.inputs.tokens = tokens
        batch.inputs.noise = self.noise(
            [mask.masked & (not drafted) for mask, drafted in zip(masks, is_drafted, strict=True)],
            indices,
            noise_sigma,
        )
        stands = [
            np.where(mask.masked, DRAFTED if drafted else MASKED, KEPT)[rows]
            for mask, drafted, rows in zip(masks, is_drafted, learnt, strict=True)
        ]
        outputs = batch.inputs.outputs
        batch.rows = {
            "weights": batch.rows["weights"],
            "stands": torch.from_numpy(np.concatenate(stands)),
            "read": tokens[outputs % len(samples), outputs // len(samples)],
            "true": batch.inputs.labels,
        }
        return batch

    def _is_drafted(self, index: int) -> bool:
        draws = generator(self.config.run.seed, Purpose.DRAFTED, index)
        return bool(draws.random() < self.config.diffusion.oput.drafted)

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """Weighted sum of the cross entropies [N]."""
        rows = batch.rows
        return Loss(
            [(output * rows["weights"]).sum()],
            batch.counts,
            {
                "loss_by_stand": (rows["stands"], output),
                "right": (rows["stands"], (rows["read"] == rows["true"]).double()),
            },
        )

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """Mean cross entropies by what a row reads, and the share of the drafts that are right."""
        masked, drafted, kept = means["loss_by_stand"]
        return {
            "loss_masked": masked,
            "loss_drafted": drafted,
            "loss_kept": kept,
            "draft_right": means["right"][DRAFTED],
        }


def with_draft(tokens_BS: torch.Tensor, outputs_N: torch.Tensor, draft_N: torch.Tensor) -> torch.Tensor:
    """The tokens with the drafts at the positions of `outputs`, in a tensor of their own."""
    B = len(tokens_BS)
    return tokens_BS.index_put((outputs_N % B, outputs_N // B), draft_N.to(tokens_BS.dtype))


OBJECTIVE = Oput
