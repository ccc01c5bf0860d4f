"""Held-out likelihood: the block-diffusion bound and the exact autoregressive NLL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.attention.mask import block_starts
from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.schedule import block_size_of
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.evaluate.held_out import HeldOut
from llada_megatron.evaluate.planted import TALLIES, Planted, shares_of
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.objectives import passes
from llada_megatron.objectives.autoregressive import autoregressive_batch
from llada_megatron.objectives.batch import MicroBatch, context_part
from llada_megatron.objectives.bound import exact_count_mask
from llada_megatron.objectives.diffusion import diffusion_inputs
from llada_megatron.parallel import groups
from llada_megatron.parallel.dealing import even_parts
from llada_megatron.runtime import device

Estimate = dict[str, Any]
"""`mean`, `se` and `bits_per_byte`; of several domains the same of each under `domains`, by name."""


def _sample_sums(batch: MicroBatch, cross_entropy: torch.Tensor) -> torch.Tensor:
    """Weighted cross entropies summed per sample, fp64 [B]."""
    samples = batch.inputs.tokens.shape[0]
    sums = cross_entropy.new_zeros(samples, dtype=torch.float64)
    return sums.index_add_(0, batch.inputs.outputs % samples, cross_entropy.double() * batch.rows["weights"])


class Evaluator:
    """Evaluates a model on the first `evaluation.sequences` held-out sequences, of each domain."""

    def __init__(self, config: Config, model: Sequence[torch.nn.Module]) -> None:
        self.config, self.model = config, model
        self.held_out = HeldOut(config)
        self.samples = self.held_out.samples
        self.baselines = self.held_out.entropies

    def bounds(self) -> dict[str, Estimate]:
        """The bound at every `evaluation.block_sizes`, keyed by block size."""
        return {str(size): self.bound(size) for size in self._block_sizes()}

    def _block_sizes(self) -> list[int]:
        length, sizes = self.config.data.sequence_length, self.config.evaluation.block_sizes
        return [block_size_of(size, length, "evaluation.block_sizes") for size in sizes]

    def every_planted(self) -> dict[str, dict[str, Estimate]]:
        """`planted` at every `evaluation.block_sizes`, where `evaluation.planted_share` asks for it."""
        sizes = self._block_sizes() if self.config.evaluation.planted_share else []
        return {str(size): self.planted(size) for size in sizes}

    def bound(self, block_size: int) -> Estimate:
        """Upper bound of the NLL in nats per token (of answers, in chats), its standard error over
        sequences, bits per byte.
        """
        draws = 1 if block_size == 1 else self.config.evaluation.draws
        sums = [self._sums(partial(self._bound_batch, block_size, draw, draws)) for draw in range(draws)]
        scored = [len(s.tokens) if s.supervised is None else s.supervised.sum() for s in self.samples]
        return self._estimate(np.mean(sums, axis=0), np.array(scored))

    def autoregressive(self) -> Estimate:
        """Exact next-token NLL in nats per predicted token."""
        sums = self._sums(lambda samples, _: autoregressive_batch(samples))
        return self._estimate(sums, self._predicted())

    def block_one_views(self) -> dict[str, float | None]:
        """An autoregressive model read as block diffusion of block 1, three ways (nats per token).

        unshifted: the masked position predicts itself; shifted: it predicts the next token, as AR labels
        do, but has not seen its own; ar_from_clean_half: the clean half predicts the next token.
        """
        views = {"unshifted": self.bound(1)["mean"]}
        for name, half in (("shifted", 0), ("ar_from_clean_half", 1)):
            sums = self._sums(partial(self._next_token_batch, half))
            views[name] = self._estimate(sums, self._predicted())["mean"]
        return views

    def planted(self, block_size: int) -> dict[str, Estimate]:
        """What the model makes of wrong tokens in held-out text, by the name of each share (planted.py)."""
        planted = Planted(self.config, block_size)
        sums = self._sums(
            lambda samples, indices: planted.batch(samples, [self.held_out.places[i] for i in indices]),
            planted.tallies,
            columns=(TALLIES,),
        )
        return shares_of(sums)

    def _predicted(self) -> np.ndarray:
        return np.array([autoregressive_batch([sample]).counts[0] for sample in self.samples])

    def _bound_batch(
        self, block_size: int, draw: int, draws: int, samples: list[PackedSample], indices: list[int]
    ) -> MicroBatch:
        grid, seed = self.config.diffusion.block_grid, self.config.run.seed
        masks = [
            exact_count_mask(
                seed,
                self.held_out.places[index],
                draw,
                draws,
                block_starts(sample.cu_seqlens, block_size, grid),
                sample.supervised,
            )
            for index, sample in zip(indices, samples, strict=True)
        ]
        inputs = diffusion_inputs(
            samples,
            [masked for masked, _ in masks],
            block_size=block_size,
            grid=grid,
            mask_token_id=self.config.model.mask_token_id,
        )
        return _batch(inputs, np.concatenate([weight[masked] for masked, weight in masks]))

    def _next_token_batch(self, half: int, samples: list[PackedSample], indices: list[int]) -> MicroBatch:
        length = len(samples[0].tokens)
        inputs = diffusion_inputs(
            samples,
            [np.ones(length, dtype=bool)] * len(samples),
            block_size=1,
            grid=self.config.diffusion.block_grid,
            mask_token_id=self.config.model.mask_token_id,
        )
        targets = autoregressive_batch(samples).inputs
        inputs.outputs = targets.outputs + half * length * len(samples)
        inputs.labels, inputs.noisy_outputs = targets.labels, half == 0
        return _batch(inputs, np.ones(len(inputs.outputs)))

    def _sums(
        self,
        build: Callable[[list[PackedSample], list[int]], MicroBatch],
        collect: Callable[[MicroBatch, torch.Tensor], torch.Tensor] = _sample_sums,
        columns: tuple[int, ...] = (),
    ) -> np.ndarray:
        """What `collect` makes of each micro-batch, fp64 [B, *columns], of all sequences.

        By default weighted cross entropies. Returns float64 [sequences, *columns], the same on every rank.
        """
        size = self.config.layout.micro_batch
        count = len(self.samples)
        # Interleaved pipelines want micro-batches in multiples of their stages.
        parts = even_parts(count, size, self.config.layout.pp if self.config.layout.vpp > 1 else 1)
        totals = torch.zeros(count, *columns, dtype=torch.float64, device=device.device())
        probe = build([self.samples[index] for index in parts[0]], parts[0])
        reduced = passes.forward_only(
            self.model,
            [self._batches(parts, build) for _ in self.model],
            collect,
            num_microbatches=len(parts),
            seq_length=probe.inputs.tokens.shape[1],
            micro_batch_size=size,
        )
        for indices, sums in zip(parts, reduced, strict=False):
            totals[indices] = sums  # a padded sequence is written twice with the same value
        covered = torch.zeros(count, *[1] * len(columns), dtype=torch.float64, device=device.device())
        # Context-parallel ranks hold parts of the same sequences: the parts add up to one covering.
        if reduced and parallel_state.get_context_parallel_rank() == 0:
            covered[[index for part in parts for index in part]] = 1.0
        for tensor in (totals, covered):
            dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            dist.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
        return (totals / covered).cpu().numpy()

    def _batches(
        self, parts: list[list[int]], build: Callable[[list[PackedSample], list[int]], MicroBatch]
    ) -> Iterator[MicroBatch]:
        for indices in parts:
            batch = build([self.samples[index] for index in indices], indices)
            yield context_part(batch).to(device.device())

    def _estimate(self, sums: np.ndarray, tokens: np.ndarray) -> Estimate:
        """Of all sequences, and of those of each domain where there are several."""
        bytes_per_token = self.held_out.bytes_per_token
        estimate = _estimate(sums, tokens, bytes_per_token[""])
        own = self.held_out.domains
        if len(own) > 1:
            estimate["domains"] = {
                name: _estimate(sums[places], tokens[places], bytes_per_token[name])
                for name, places in own.items()
            }
        return estimate


def _estimate(sums: np.ndarray, tokens: np.ndarray, bytes_per_token: float | None) -> Estimate:
    mean = float(sums.sum() / tokens.sum())
    per_sequence = sums / tokens
    error = float(per_sequence.std(ddof=1) / math.sqrt(len(sums))) if len(sums) > 1 else None
    bits = mean / math.log(2) / bytes_per_token if bytes_per_token else None
    return {"mean": mean, "se": error, "bits_per_byte": bits}


def _batch(inputs: ModelInputs, weights: np.ndarray) -> MicroBatch:
    return MicroBatch(inputs, {"weights": torch.from_numpy(weights)})


def checkpoint_metrics(
    bounds: dict[str, Estimate], autoregressive: dict[str, Any] | None
) -> dict[str, float]:
    """What a manifest says of an evaluation: `nll_block4`, ..., `nll_ar`; without what is not finite."""
    figures = {f"nll_block{size}": bound["mean"] for size, bound in bounds.items()}
    figures["nll_ar"] = autoregressive["nll"] if autoregressive else None
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def evaluate_checkpoint(config: Config, checkpoint: Path, *, autoregressive: bool) -> dict[str, Any]:
    """The bound at config.evaluation.block_sizes, the exact NLL if asked, and what the text itself says.

    For every rank of config.layout, which need not be the layout that saved; a checkpoint's files are taken
    as they are.
    """
    device.seed_everything(config.run.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=config.training.threads)
    try:
        evaluator = Evaluator(config, load_model(config, checkpoint))
        exact = evaluator.autoregressive() if autoregressive else None
        return {
            "bound": evaluator.bounds(),
            "ar": exact and {"nll": exact.pop("mean"), **exact},
            "planted": evaluator.every_planted(),
            "baselines": evaluator.baselines,
            "sequences": len(evaluator.samples),
        }
    finally:
        groups.destroy()
