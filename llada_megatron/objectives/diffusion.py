"""Absorbing-mask block diffusion: the masked tokens of a block, given the clean blocks before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llada_megatron.attention.context import ContextShard
from llada_megatron.attention.mask import block_starts
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import BlockGrid, Config
from llada_megatron.config.stage_settings import diffusion_of
from llada_megatron.data.packed import PackedSample, PackedSequences
from llada_megatron.model.inputs import EmbeddingNoise, ModelInputs
from llada_megatron.model.readout import Readout, without_token
from llada_megatron.objectives.batch import MicroBatch, Samples, flat_outputs, model_mask
from llada_megatron.objectives.corruption import Corruption, corrupt
from llada_megatron.objectives.objective import Loss, Objective
from llada_megatron.objectives.random_length import at_random_length
from llada_megatron.objectives.weights import embedding_noise_sigma, position_weights
from llada_megatron.parallel.random import Purpose, torch_seed

BINNED = ("loss_by_t", "loss_by_block_position")
"""Figures of the cross entropies, whose bins a batch holds under their names."""
RATE_BINS, POSITION_BINS = (OBJECTIVES["diffusion"].figures[name].bins for name in BINNED)


def readout_of(readout: Readout, config: Config) -> Readout:
    """The readout, of a model that may or may not give the mask token."""
    if config.diffusion.gives_mask_token:
        return readout
    return without_token(readout, config.model.mask_token_id)


class Diffusion(Objective):
    """Weighted cross entropies of the masked tokens; formulas in objectives/weights.py."""

    corrupt: Callable[..., Corruption] = staticmethod(corrupt)
    """Which tokens are masked, and at what rate."""

    def __init__(self, name: str, config: Config, schedule: Schedule) -> None:
        super().__init__(name, config, schedule)
        self.readout = readout_of(self.readout, config)

    def batch(
        self,
        data: PackedSequences,
        indices: list[int],
        stage: Stage,
        *,
        noise_sigma: float = 0.0,
        draft: torch.Tensor | None = None,
    ) -> MicroBatch:
        """`[x_t ; x_0]` of the samples, corrupted as the stage asks."""
        samples = self.read(data, indices)
        corruptions = self.corruptions(samples, indices, stage)
        batch = self.corrupted(samples, corruptions, stage.block_size)
        batch.inputs.noise = self.noise([each.masked for each in corruptions], indices, noise_sigma)
        return batch

    def _read(self, data: Samples, sequence: int) -> PackedSample:
        share = self.config.diffusion.random_length_share
        return at_random_length(super()._read(data, sequence), self.config.run.seed, sequence, share)

    def corruptions(self, samples: list[PackedSample], indices: list[int], stage: Stage) -> list[Corruption]:
        """How the stage asks for each sample to be corrupted; of what is left out nothing is masked."""
        diffusion = diffusion_of(self.config.diffusion, self.config.schedule.stages[stage.index])
        seed, found = self.config.run.seed, []
        for index, sample in zip(indices, samples, strict=True):
            corruption = self.corrupt(
                seed, index, sample.cu_seqlens, stage.block_size, diffusion, sample.supervised
            )
            corruption.masked[:] &= not sample.is_left_out
            found.append(corruption)
        return found

    def noise(self, masked: list[np.ndarray], indices: list[int], sigma: float) -> EmbeddingNoise | None:
        """That of the samples' mask tokens, bool [L] each; the clean half gets none."""
        if sigma <= 0:
            return None
        rows = [torch.from_numpy(np.flatnonzero(each)) for each in masked]
        return EmbeddingNoise(
            sigma=sigma,
            seeds=[torch_seed(self.config.run.seed, Purpose.EMBEDDING_NOISE, index) for index in indices],
            drawn=[len(each) for each in rows],
            rows=rows,
        )

    def corrupted(
        self, samples: list[PackedSample], corruptions: list[Corruption], block_size: int
    ) -> MicroBatch:
        """The micro-batch of samples whose masks are given."""
        grid = self.config.diffusion.block_grid
        groups = [c.group_starts for c in corruptions if c.group_starts is not None]
        inputs = diffusion_inputs(
            samples,
            [corruption.masked for corruption in corruptions],
            block_size=block_size,
            grid=grid,
            mask_token_id=self.config.model.mask_token_id,
            group_starts=groups or None,
        )
        weights, counts, rates, places = [], [], [], []
        for sample, corruption in zip(samples, corruptions, strict=True):
            weight, count = position_weights(
                corruption, self.config.diffusion, sample.cu_seqlens, sample.supervised
            )
            place = np.arange(len(weight)) - block_starts(sample.cu_seqlens, block_size, grid)
            weights.append(weight[corruption.masked])
            counts.append(0 if sample.is_left_out else count)
            rates.append(corruption.rate[corruption.masked])
            places.append(place[corruption.masked])
        rate_bin = np.minimum((np.concatenate(rates) * RATE_BINS).astype(np.int64), RATE_BINS - 1)
        bins = min(block_size, POSITION_BINS)
        return MicroBatch(
            inputs=inputs,
            rows={
                "weights": torch.from_numpy(np.concatenate(weights)).float(),
                "loss_by_t": torch.from_numpy(rate_bin),
                "loss_by_block_position": torch.from_numpy(np.concatenate(places) * bins // block_size),
            },
            counts=(sum(counts),),
        )

    def loss(self, batch: MicroBatch, output: torch.Tensor) -> Loss:
        """Weighted sum of the cross entropies [N]."""
        return Loss(
            [(output * batch.rows["weights"]).sum()],
            batch.counts,
            {name: (batch.rows[name], output) for name in BINNED},
        )

    def noise_over_rms(self, step: int) -> float:
        """Fades over the run's diffusion stages, which may be several."""
        noise = self.config.diffusion.embedding_noise
        before = self.schedule.tokens_before(self.schedule.first_diffusion_step())
        tokens = self.schedule.tokens_before(step) - before
        return embedding_noise_sigma(noise.sigma_over_rms, noise.fade_tokens, tokens)

    def shown(self, stage: Stage, means: dict[str, list[float | None]]) -> dict[str, Any]:
        """A block has no more places than tokens."""
        by_position = means["loss_by_block_position"][: min(stage.block_size, POSITION_BINS)]
        return {**means, "loss_by_block_position": by_position}


def diffusion_inputs(
    samples: list[PackedSample],
    masked: list[np.ndarray],
    *,
    block_size: int,
    grid: BlockGrid,
    mask_token_id: int,
    group_starts: list[np.ndarray] | None = None,
) -> ModelInputs:
    """`[x_t ; x_0]` (x_t alone when one block spans the sequence), with outputs at the masked positions."""
    clean = np.stack([sample.tokens for sample in samples])
    noisy = np.where(np.stack(masked), mask_token_id, clean)
    clean_copy = block_size < clean.shape[1]
    positions = torch.arange(clean.shape[1])[None]
    mask = model_mask(
        samples, block_size, grid, clean_copy=clean_copy, causal=False, group_starts=group_starts
    )
    rows = [np.flatnonzero(row) for row in masked]
    return ModelInputs(
        tokens=torch.from_numpy(np.concatenate([noisy, clean], axis=1) if clean_copy else noisy),
        positions=torch.cat([positions, positions], dim=1) if clean_copy else positions,
        keys=ContextShard(mask),
        outputs=flat_outputs(rows),
        labels=torch.from_numpy(np.concatenate([c[row] for c, row in zip(clean, rows, strict=True)])),
        noisy_outputs=clean_copy,
    )


OBJECTIVE = Diffusion
