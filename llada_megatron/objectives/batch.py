"""From packed sequences to what the model reads: built on the host, so that every shape is known there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import BlockGrid, DiffusionConfig
from llada_megatron.data.packed import PackedSample
from llada_megatron.model.inputs import EmbeddingNoise, ModelInputs
from llada_megatron.objectives.corruption import block_starts, corrupt
from llada_megatron.objectives.weights import position_weights
from llada_megatron.parallel.random import Purpose, torch_seed

RATE_BINS = 10
POSITION_BINS = 32


@dataclass
class MicroBatch:
    """Model inputs and the weights of their N outputs; bins tell metrics apart."""

    inputs: ModelInputs
    weights: torch.Tensor
    """fp32 [N]."""
    count: int
    """What this micro-batch adds to the loss's denominator."""
    rate_bin: torch.Tensor
    """int64 [N]: which tenth of [0, 1] the mask rate lies in."""
    position_bin: torch.Tensor
    """int64 [N]: place in the block, in at most POSITION_BINS bins."""

    def to(self, device: torch.device) -> MicroBatch:
        """Move every tensor; a no-op on the host."""
        if device.type == "cpu":
            return self
        self.inputs.keys.to(device)
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """Put function(tensor) in the place of every tensor that the device reads."""
        inputs = self.inputs
        for owner, names in (
            (inputs, ("tokens", "positions", "outputs", "labels")),
            (self, ("weights", "rate_bin", "position_bin")),
        ):
            for name in names:
                if (value := getattr(owner, name)) is not None:
                    setattr(owner, name, function(value))
        if inputs.noise is not None:
            inputs.noise.rows = [function(rows) for rows in inputs.noise.rows]
        return self


def check_vocabulary(samples: list[PackedSample], vocab_size: int) -> None:
    """Raise BadInput for a token that the model has no row for.

    Under tensor parallelism megatron-core would embed it as zero and give it a wrong loss, silently.
    """
    largest = max(int(sample.tokens.max()) for sample in samples)
    if largest >= vocab_size:
        raise BadInput(
            f"The data hold token {largest}, outside model.vocab_size={vocab_size}: set a larger"
            " model.vocab_size, or prepare the data with the model's tokenizer."
        )


def model_mask(
    samples: list[PackedSample], block_size: int, grid: BlockGrid, *, clean_copy: bool, causal: bool
) -> BlockDiffusionMask:
    """The attention mask of a micro-batch."""
    return BlockDiffusionMask(
        [torch.from_numpy(sample.cu_seqlens) for sample in samples],
        block_size,
        block_grid=grid.value,
        clean_copy=clean_copy,
        causal=causal,
    )


def flat_outputs(rows: list[np.ndarray]) -> torch.Tensor:
    """int64 [N]: rows of each sample as indices into hidden states [S, B, H] flattened over S and B."""
    return torch.from_numpy(np.concatenate([row * len(rows) + b for b, row in enumerate(rows)]))


def autoregressive_batch(samples: list[PackedSample]) -> MicroBatch:
    """Next-token prediction inside documents; the first token of a document is predicted by nothing."""
    rows, labels = [], []
    for sample in samples:
        row = np.setdiff1d(np.arange(len(sample.tokens)), sample.cu_seqlens[1:] - 1)
        rows.append(row)
        labels.append(sample.tokens[row + 1])
    tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]))
    count = sum(len(row) for row in rows)
    zeros = torch.zeros(count, dtype=torch.int64)
    inputs = ModelInputs(
        tokens=tokens,
        positions=torch.arange(tokens.shape[1])[None],
        keys=ContextShard(model_mask(samples, 1, BlockGrid.sequence, clean_copy=False, causal=True)),
        outputs=flat_outputs(rows),
        labels=torch.from_numpy(np.concatenate(labels)),
    )
    return MicroBatch(inputs, torch.ones(count), count, zeros, zeros)


def diffusion_inputs(
    samples: list[PackedSample],
    masked: list[np.ndarray],
    *,
    block_size: int,
    grid: BlockGrid,
    mask_token_id: int,
) -> ModelInputs:
    """`[x_t ; x_0]` (x_t alone when one block spans the sequence), with outputs at the masked positions."""
    clean = np.stack([sample.tokens for sample in samples])
    noisy = np.where(np.stack(masked), mask_token_id, clean)
    clean_copy = block_size < clean.shape[1]
    positions = torch.arange(clean.shape[1])[None]
    rows = [np.flatnonzero(row) for row in masked]
    return ModelInputs(
        tokens=torch.from_numpy(np.concatenate([noisy, clean], axis=1) if clean_copy else noisy),
        positions=torch.cat([positions, positions], dim=1) if clean_copy else positions,
        keys=ContextShard(model_mask(samples, block_size, grid, clean_copy=clean_copy, causal=False)),
        outputs=flat_outputs(rows),
        labels=torch.from_numpy(np.concatenate([c[row] for c, row in zip(clean, rows, strict=True)])),
    )


def diffusion_batch(
    samples: list[PackedSample],
    indices: list[int],
    stage: Stage,
    diffusion: DiffusionConfig,
    *,
    seed: int,
    mask_token_id: int,
    noise_sigma: float,
) -> MicroBatch:
    """Corrupt the samples with global indices `indices` as the stage asks."""
    grid = diffusion.block_grid
    corruptions = [
        corrupt(seed, index, sample.cu_seqlens, stage.block_size, diffusion)
        for index, sample in zip(indices, samples, strict=True)
    ]
    masked = [corruption.masked for corruption in corruptions]
    inputs = diffusion_inputs(
        samples, masked, block_size=stage.block_size, grid=grid, mask_token_id=mask_token_id
    )
    if noise_sigma > 0:
        inputs.noise = EmbeddingNoise(
            sigma=noise_sigma,
            seeds=[torch_seed(seed, Purpose.EMBEDDING_NOISE, index) for index in indices],
            rows=[torch.from_numpy(np.flatnonzero(row)) for row in masked],  # the clean half gets no noise
        )
    weights, counts, rates, places = [], [], [], []
    for sample, corruption in zip(samples, corruptions, strict=True):
        weight, count = position_weights(corruption, diffusion)
        place = np.arange(len(weight)) - block_starts(sample.cu_seqlens, stage.block_size, grid)
        weights.append(weight[corruption.masked])
        counts.append(count)
        rates.append(corruption.rate[corruption.masked])
        places.append(place[corruption.masked])
    rate_bin = np.minimum((np.concatenate(rates) * RATE_BINS).astype(np.int64), RATE_BINS - 1)
    bins = min(stage.block_size, POSITION_BINS)
    return MicroBatch(
        inputs=inputs,
        weights=torch.from_numpy(np.concatenate(weights)).float(),
        count=sum(counts),
        rate_bin=torch.from_numpy(rate_bin),
        position_bin=torch.from_numpy(np.concatenate(places) * bins // stage.block_size),
    )


def context_part(batch: MicroBatch) -> MicroBatch:
    """This context-parallel rank's part of a micro-batch: rows, outputs and weights of the tokens it holds.

    The batch is built whole on every rank, so masks, labels and noise cannot depend on the split. `count`,
    which is summed over the ranks, stays with the first.
    """
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return batch
    inputs = batch.inputs
    shard = ContextShard(inputs.keys.mask, parallel_state.get_context_parallel_rank(), ranks)
    B, L, n = shard.mask.batch, shard.mask.length, shard.tokens.shape[1]
    sample = np.arange(B)[:, None]
    position, b = np.divmod(inputs.outputs.numpy(), B)  # of each of the N outputs, in the whole sequence
    half, token = np.divmod(position, L)
    here = torch.from_numpy(shard.owner[b, token] == shard.rank)
    row = half * n + shard.row_of_token[b, token]
    rows = torch.from_numpy(shard.rows)
    noise = inputs.noise
    if noise is not None:
        owned = np.where(shard.owner == shard.rank, shard.row_of_token, -1)
        local = [torch.from_numpy(owned[b, masked.numpy()]) for b, masked in enumerate(noise.rows)]
        noise = EmbeddingNoise(noise.sigma, noise.seeds, local)
    part = ModelInputs(
        tokens=inputs.tokens[sample, rows],
        positions=inputs.positions.expand(B, -1).gather(1, rows),
        keys=shard,
        outputs=torch.from_numpy(row * B + b)[here],
        labels=None if inputs.labels is None else inputs.labels[here],
        readout=inputs.readout,
        noise=noise,
    )
    count = batch.count if shard.rank == 0 else 0
    return MicroBatch(part, batch.weights[here], count, batch.rate_bin[here], batch.position_bin[here])
