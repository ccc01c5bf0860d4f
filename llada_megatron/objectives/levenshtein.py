"""Drafts with wrong, surplus and missing tokens, and the orders that mend them (LLaDA2.2).

A draft is the target of a block with some of its tokens masked as in diffusion, and among the visible ones
some dropped, replaced, or with a wrong one before them; the block keeps its length, by masks at its end or by
what falls off there. The model reads `[draft ; x_0]` and learns at every position of the draft the label of
objectives/alignment.py.

Legend: L tokens of a sequence, K blocks, m tokens of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.choices import BadSamples
from llada_megatron.config.levenshtein import LevenshteinConfig
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config, Weight
from llada_megatron.config.stage_settings import diffusion_of
from llada_megatron.data.packed import BadSample, PackedSample, PackedSequences
from llada_megatron.objectives.alignment import edit_labels, ends
from llada_megatron.objectives.batch import MicroBatch, Samples
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.objective import Loss
from llada_megatron.parallel.random import Purpose, generator


class Kind(IntEnum):
    """What a position of a draft is, by itself or by its label."""

    masked = 0
    keep = 1
    substitute = 2
    delete = 3
    split = 4


@dataclass(frozen=True)
class Draft:
    """A sequence as the model reads it; all [L]."""

    tokens: np.ndarray
    """int64: where nothing is taught those of the text, or masks."""
    labels: np.ndarray
    """int64, of the positions that are taught."""
    is_taught: np.ndarray
    rate: np.ndarray
    """float64: the t that each position's text was masked with, the same in all of a block."""


class Levenshtein(Diffusion):
    """Weighted cross entropies of the labels; weights and denominators are those of objectives/weights.py.

    A masked position weighs as in diffusion, one that holds a token `levenshtein.visible_weight` without 1/t.
    """

    def __init__(self, name: str, config: Config, schedule: Schedule) -> None:
        super().__init__(name, config, schedule)
        self.settings = config.levenshtein

    def batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """`[draft ; x_0]` of the samples."""
        mask = self.config.model.mask_token_id
        samples = self.read(data, indices)
        drafts = [self.draft(i, sample, stage) for i, sample in zip(indices, samples, strict=True)]
        rows = [Corruption(draft.is_taught, draft.rate) for draft in drafts]
        taught = [
            replace(sample, supervised=draft.is_taught) for sample, draft in zip(samples, drafts, strict=True)
        ]
        batch = self.corrupted(taught, rows, stage.block_size)
        inputs = batch.inputs
        inputs.tokens[:, : len(drafts[0].tokens)] = torch.from_numpy(np.stack([d.tokens for d in drafts]))
        tokens, labels, rate = (
            np.concatenate([getattr(d, name)[d.is_taught] for d in drafts])
            for name in ("tokens", "labels", "rate")
        )
        inputs.labels = torch.from_numpy(labels)
        inputs.noise = self.noise([d.tokens == mask for d in drafts], indices, noise_sigma)
        kinds = self._kinds(tokens, labels)
        flat = rate if self.config.diffusion.weight is Weight.inverse else np.ones_like(rate)
        factor = np.where(kinds == Kind.masked, 1.0, self.settings.visible_weight * flat)
        return replace(
            batch,
            rows={
                "weights": batch.rows["weights"] * torch.from_numpy(factor).float(),
                "loss_by_label": torch.from_numpy(kinds),
            },
        )

    def draft(self, index: int, sample: PackedSample, stage: Stage) -> Draft:
        """The draft of a sample: a function of (run seed, sample index) and its tokens."""
        config, settings = self.config, self.settings
        seed, mask = config.run.seed, config.model.mask_token_id
        diffusion = diffusion_of(config.diffusion, config.schedule.stages[stage.index])
        corruption = self.corrupt(
            seed, index, sample.cu_seqlens, stage.block_size, diffusion, sample.supervised
        )
        starts = block_starts(sample.cu_seqlens, stage.block_size, diffusion.block_grid)
        is_taught, is_hidden = first_turns(starts, sample.supervised)
        is_taught &= not sample.is_left_out
        tokens = np.where(is_hidden, mask, sample.tokens).astype(np.int64)
        labels = tokens.copy()
        if not is_taught.any():
            return Draft(tokens, labels, is_taught, corruption.rate)
        place_Km = in_rows(starts, is_taught)
        is_here = place_Km >= 0
        target_Km = np.where(is_here, sample.tokens[place_Km], ends(place_Km.shape[1]))
        draft_Km = spoiled(
            target_Km,
            is_here,
            np.where(is_here, corruption.masked[place_Km], False),
            sample.tokens[is_taught],
            settings,
            mask,
            generator(seed, Purpose.DRAFT, index),
        )
        labels_Km = edit_labels(draft_Km, target_Km, settings.delete_token_id, settings.split_token_id)
        tokens[place_Km[is_here]], labels[place_Km[is_here]] = draft_Km[is_here], labels_Km[is_here]
        return Draft(tokens, labels, is_taught, corruption.rate)

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """Weighted sum of the cross entropies [N]."""
        total = (output * batch.rows["weights"]).sum()
        return Loss([total], batch.counts, {"loss_by_label": (batch.rows["loss_by_label"], output)})

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """The mean cross entropy of each kind of position, by its name."""
        return {"loss_by_label": {kind.name: means["loss_by_label"][kind] for kind in Kind}}

    def _kinds(self, tokens_N: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
        """Kind of each taught position, int64 [N]."""
        settings = self.settings
        return np.select(
            [
                tokens_N == self.config.model.mask_token_id,
                labels_N == settings.delete_token_id,
                labels_N == settings.split_token_id,
                labels_N == tokens_N,
            ],
            [Kind.masked, Kind.delete, Kind.split, Kind.keep],
            Kind.substitute,
        ).astype(np.int64)

    def _read(self, data: Samples, sequence: int) -> PackedSample:
        """Refuses or leaves out, as training.bad_samples says, text that holds an order."""
        sample = super()._read(data, sequence)
        orders = [self.settings.delete_token_id, self.settings.split_token_id]
        found = np.flatnonzero(np.isin(sample.tokens, orders))
        if not found.size or sample.is_left_out:
            return sample
        fault = BadSample(
            f"{sample.document_at(found[0])} holds token {sample.tokens[found[0]]}, which is an order in"
            " levenshtein.delete_token_id or split_token_id: name rows that no text has, or set"
            " training.bad_samples=skip.",
            sample,
        )
        if self.config.training.bad_samples is BadSamples.refuse:
            raise fault
        self.left_out[sequence] = str(fault)
        return replace(sample, is_left_out=True)


def first_turns(block_start_L: np.ndarray, supervised_L: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """What is taught, bool [L]: of each block the first run of supervised tokens; and what is hidden behind.

    Inside a block everybody sees everybody, so that a later turn would give an earlier answer away: LLaDA2.2
    supervises the first turn alone. As in decoding, there are masks behind what is taught (ours).
    """
    L = len(block_start_L)
    if supervised_L is None:
        return np.ones(L, dtype=bool), np.zeros(L, dtype=bool)
    place = np.arange(L)
    begins = supervised_L & ((place == block_start_L) | ~np.append(False, supervised_L[:-1]))
    runs = np.cumsum(begins)
    before = np.append(0, runs)[block_start_L]  # runs that began before the block
    run = runs - before
    return supervised_L & (run == 1), (run > 1) | ((run == 1) & ~supervised_L)


def in_rows(block_start_L: np.ndarray, is_taught_L: np.ndarray) -> np.ndarray:
    """The taught places of each block, int64 [K, m], filled up with -1."""
    places = np.flatnonzero(is_taught_L)
    starts, first, counts = np.unique(block_start_L[places], return_index=True, return_counts=True)
    place_Km = np.full((len(starts), counts.max()), -1)
    block = np.repeat(np.arange(len(starts)), counts)
    place_Km[block, np.arange(len(places)) - first[block]] = places
    return place_Km


def spoiled(
    target_Km: np.ndarray,
    is_here_Km: np.ndarray,
    is_masked_Km: np.ndarray,
    words: np.ndarray,
    settings: LevenshteinConfig,
    mask_token_id: int,
    draws: np.random.Generator,
) -> np.ndarray:
    """Drafts int64 [K, m] of targets, alike behind their ends.

    A visible token is dropped, or else replaced, and before any token a wrong one may stand; `words`, some
    tokens of the text, are what wrong ones are drawn from.
    """
    K, m = target_Km.shape
    u, w = draws.random((2, K, m))
    wrong_Km, extra_Km = words[draws.integers(len(words), size=(2, K, m))]
    is_visible = is_here_Km & ~is_masked_Km
    is_dropped = is_visible & (u < settings.deleted)
    is_wrong = is_visible & ~is_dropped & (u < settings.deleted + settings.substituted)
    own_Km = np.select([is_masked_Km, is_wrong], [mask_token_id, wrong_Km], target_Km)
    is_extra = is_here_Km & (w < settings.inserted)
    stays_Km2 = np.stack([is_extra, is_here_Km & ~is_dropped], axis=2).reshape(K, 2 * m)
    said_Km2 = np.stack([extra_Km, own_Km], axis=2).reshape(K, 2 * m)
    at_Km2 = stays_Km2.cumsum(axis=1) - 1
    stays_Km2 &= at_Km2 < is_here_Km.sum(axis=1, keepdims=True)
    draft_Km = np.where(is_here_Km, mask_token_id, target_Km)
    block = np.nonzero(stays_Km2)[0]
    draft_Km[block, at_Km2[stays_Km2]] = said_Km2[stays_Km2]
    return draft_Km


OBJECTIVE = Levenshtein
