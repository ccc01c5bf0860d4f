"""Masked tokens, and visible ones that are wrong: a model that fills in and puts right (LLaDA2.1).

    loss = sum_{i masked} w(t_i) CE_i + sum_{i replaced} weight CE_i + sum_{i kept} kept_weight CE_i

over the denominator of objective `diffusion`, CE_i that of the true token at i. Wrong tokens stand in the
noisy half alone (T2T of LLaDA2.1, arXiv 2602.08676, whose shares and weights are not published).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llada_megatron.config.choices import WrongWords
from llada_megatron.config.editing import EditingConfig
from llada_megatron.config.schedule import Stage
from llada_megatron.data.packed import PackedSample, PackedSequences
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.diffusion import BINNED, RATE_BINS, Diffusion
from llada_megatron.objectives.objective import Loss
from llada_megatron.parallel.random import Purpose, generator

MASKED, REPLACED, KEPT = range(3)
"""What a row with a loss reads, in `MicroBatch.rows["stands"]`."""
TRIES = 8
"""Draws of a wrong token, of which the first that is wrong is taken; a token without one stays."""


class Editing(Diffusion):
    """The diffusion loss, and the cross entropies of tokens that are not masked."""

    def batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """`[x_t ; x_0]` of the samples, x_t with wrong tokens among those that are not masked."""
        samples = self.read(data, indices)
        masks = self.corruptions(samples, indices, stage)
        noisy, replaced = [], []
        for index, sample, mask in zip(indices, samples, masks, strict=True):
            words, is_wrong = self._with_wrong_words(index, sample, mask.masked)
            noisy.append(np.where(mask.masked, self.config.model.mask_token_id, words))
            replaced.append(is_wrong)
        settings = self.config.diffusion.editing
        learnt = [
            maskable(sample) if settings.kept_weight else mask.masked | is_wrong
            for sample, mask, is_wrong in zip(samples, masks, replaced, strict=True)
        ]
        batch = self.corrupted(  # weighs what is not masked as if it had been at a rate of 1
            samples,
            [
                Corruption(rows, np.where(mask.masked, mask.rate, 1.0), mask.group_starts)
                for mask, rows in zip(masks, learnt, strict=True)
            ],
            stage.block_size,
        )
        batch.inputs.tokens[:, : len(noisy[0])] = torch.from_numpy(np.stack(noisy))
        stands = [
            np.where(mask.masked, MASKED, np.where(is_wrong, REPLACED, KEPT))[rows]
            for mask, is_wrong, rows in zip(masks, replaced, learnt, strict=True)
        ]
        batch.rows["stands"] = torch.from_numpy(np.concatenate(stands))
        batch.rows["loss_by_t"][batch.rows["stands"] != MASKED] = RATE_BINS
        weights = torch.tensor([1.0, settings.weight, settings.kept_weight])
        batch.rows["weights"] *= weights[batch.rows["stands"]]
        batch.inputs.noise = self.noise([mask.masked for mask in masks], indices, noise_sigma)
        return batch

    def _with_wrong_words(
        self, index: int, sample: PackedSample, masked: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        settings, seed = self.config.diffusion.editing, self.config.run.seed
        at_random = generator(seed, Purpose.WRONG_PLACE, index).random(len(masked)) < settings.replaced
        return with_wrong_words(
            sample,
            at_random & maskable(sample) & ~masked,
            generator(seed, Purpose.WRONG_WORD, index),
            settings,
            self.config.model.mask_token_id,
        )

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """Weighted sum of the cross entropies [N]."""
        found = super().loss(batch, output)
        return replace(found, figures={**found.figures, "loss_by_stand": (batch.rows["stands"], output)})

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """Mean cross entropies, without their weights, also by what a row reads; by t the masked ones'."""
        masked, replaced, kept = means["loss_by_stand"]
        shown = super().shown(stage, {name: means[name] for name in BINNED})
        shown["loss_by_t"] = shown["loss_by_t"][:RATE_BINS]
        return {**shown, "loss_masked": masked, "loss_replaced": replaced, "loss_kept": kept}


def maskable(sample: PackedSample) -> np.ndarray:
    """Which tokens of a sample may be masked, replaced and learnt, bool [L]."""
    if sample.is_left_out:
        return np.zeros(len(sample.tokens), dtype=bool)
    return np.ones(len(sample.tokens), dtype=bool) if sample.supervised is None else sample.supervised


def with_wrong_words(
    sample: PackedSample,
    wanted: np.ndarray,
    draws: np.random.Generator,
    settings: EditingConfig,
    mask_token_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """The sample's tokens, wrong where `wanted` as far as TRIES draws found one, and where they are wrong.

    wanted: bool [L]. Returns int64 [L] and bool [L]. A wrong token is never the true one, nor the mask.
    """
    tokens, L = sample.tokens, len(sample.tokens)
    words = tokens[maskable(sample)]
    if settings.words is WrongWords.vocabulary:
        words = np.arange(settings.vocabulary)
    if not len(words):
        return tokens.copy(), np.zeros(L, dtype=bool)
    drawn_TL = words[draws.integers(0, len(words), (TRIES, L))]
    is_wrong_TL = (drawn_TL != tokens) & (drawn_TL != mask_token_id)
    chosen_L = drawn_TL[is_wrong_TL.argmax(axis=0), np.arange(L)]
    is_wrong = wanted & is_wrong_TL.any(axis=0)
    return np.where(is_wrong, chosen_L, tokens), is_wrong


OBJECTIVE = Editing
