"""Held-out likelihood: the block-diffusion bound, the exact autoregressive NLL, entropies of the text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model

from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.schedule import block_size_of
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample, build_sequences
from llada_megatron.data.prepare import read_sidecar
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate.infill import infill
from llada_megatron.objectives.batch import (
    MicroBatch,
    autoregressive_batch,
    check_vocabulary,
    context_part,
    diffusion_inputs,
)
from llada_megatron.objectives.bound import exact_count_mask
from llada_megatron.objectives.corruption import block_starts
from llada_megatron.objectives.passes import forward_step
from llada_megatron.parallel import groups
from llada_megatron.parallel.dealing import data_parallel
from llada_megatron.parallel.random import Purpose, generator
from llada_megatron.runtime import device
from llada_megatron.runtime.launch import threads_per_process

Estimate = dict[str, float | None]
MASK_CHARACTER = "░"
BASELINE_SEQUENCES = 4096
"""The entropies of the text are taken over at most this many held-out sequences."""


class Evaluator:
    """Evaluates a model on the first `evaluation.sequences` held-out sequences."""

    def __init__(self, config: Config, model: list[Any]) -> None:
        self.config, self.model = config, model
        wanted = max(config.evaluation.sequences, BASELINE_SEQUENCES)
        data = build_sequences(
            config.data,
            split="validation",
            seed=config.run.seed,
            mask_token_id=config.model.mask_token_id,
            sequences_wanted=wanted,
        )
        held_out = [data[index] for index in range(min(data.sequences_per_epoch, wanted))]
        check_vocabulary(held_out, config.model.vocab_size)
        self.samples = held_out[: config.evaluation.sequences]
        self.bytes_per_token = bytes_per_token(config.data.path)
        self.baselines = entropies(held_out)

    def bounds(self) -> dict[str, Estimate]:
        """The bound at every `evaluation.block_sizes`, keyed by block size."""
        length = self.config.data.sequence_length
        sizes = [
            block_size_of(size, length, "evaluation.block_sizes")
            for size in self.config.evaluation.block_sizes
        ]
        return {str(size): self.bound(size) for size in sizes}

    def bound(self, block_size: int) -> Estimate:
        """Upper bound of the NLL in nats per token, its standard error over sequences, bits per byte."""
        draws = 1 if block_size == 1 else self.config.evaluation.draws
        sums = [self._sums(partial(self._bound_batch, block_size, draw, draws)) for draw in range(draws)]
        tokens = np.full(len(self.samples), self.config.data.sequence_length)
        return self._estimate(np.mean(sums, axis=0), tokens)

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

    def infilled(self, block_size: int) -> Iterator[tuple[str, str, str]]:
        """(original, masked, filled) texts of held-out sequences, half masked in their second half."""
        tokenizer = load_tokenizer(self.config.data.tokenizer)
        mask_token_id = self.config.model.mask_token_id
        for index, sample in enumerate(self.samples[: self.config.evaluation.infill_sequences]):
            length = len(sample.tokens)
            score = generator(self.config.run.seed, Purpose.EVALUATION_INFILL, index).random(length)
            hidden = (score < 0.5) & (np.arange(length) >= length // 2)
            tokens = np.where(hidden, mask_token_id, sample.tokens)
            with _evaluating(self.model):
                filled, _ = infill(
                    get_attr_wrapped_model(self.model[0], "forward", return_model_obj=True),
                    tokens,
                    block_size=block_size,
                    mask_token_id=mask_token_id,
                    grid=self.config.diffusion.block_grid,
                    cu_seqlens=sample.cu_seqlens,
                )
            shown = [
                MASK_CHARACTER if h else tokenizer.decode([int(t)])
                for h, t in zip(hidden, tokens, strict=True)
            ]
            yield tokenizer.decode(sample.tokens.tolist()), "".join(shown), tokenizer.decode(filled.tolist())

    def _predicted(self) -> np.ndarray:
        return np.array([len(s.tokens) - len(s.cu_seqlens) + 1 for s in self.samples])

    def _bound_batch(
        self, block_size: int, draw: int, draws: int, samples: list[PackedSample], indices: list[int]
    ) -> MicroBatch:
        grid, seed = self.config.diffusion.block_grid, self.config.run.seed
        masks = [
            exact_count_mask(seed, index, draw, draws, block_starts(sample.cu_seqlens, block_size, grid))
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
        inputs.labels = targets.labels
        return _batch(inputs, np.ones(len(inputs.outputs)))

    def _sums(self, build: Callable[[list[PackedSample], list[int]], MicroBatch]) -> np.ndarray:
        """Weighted cross entropies summed per sequence, float64 [sequences], the same on every rank."""
        rank, ranks = data_parallel()
        size = self.config.layout.micro_batch
        count = len(self.samples)
        # Interleaved pipelines want micro-batches in multiples of their stages.
        multiple = size * (self.config.layout.pp if self.config.layout.vpp > 1 else 1)
        per_rank = -(-count // (multiple * ranks)) * multiple
        padded = [min(index, count - 1) for index in range(per_rank * ranks)]
        mine = padded[rank * per_rank : (rank + 1) * per_rank]
        groups = [mine[at : at + size] for at in range(0, per_rank, size)]
        totals = torch.zeros(count, dtype=torch.float64, device=device.device())
        with _evaluating(self.model):
            probe = build([self.samples[index] for index in groups[0]], groups[0])
            reduced = get_forward_backward_func()(
                forward_step_func=_forward,
                data_iterator=[self._batches(groups, build) for _ in self.model],
                model=self.model,
                num_microbatches=len(groups),
                seq_length=probe.inputs.tokens.shape[1],
                micro_batch_size=size,
                forward_only=True,
            )
        for indices, sums in zip(groups, reduced, strict=False):
            totals[indices] = sums  # a padded sequence is written twice with the same value
        covered = torch.zeros_like(totals)
        # Context-parallel ranks hold parts of the same sequences: the parts add up to one covering.
        if reduced and parallel_state.get_context_parallel_rank() == 0:
            covered[mine] = 1.0
        for tensor in (totals, covered):
            dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
            dist.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
        return (totals / covered).cpu().numpy()

    def _batches(
        self, groups: list[list[int]], build: Callable[[list[PackedSample], list[int]], MicroBatch]
    ) -> Iterator[MicroBatch]:
        for indices in groups:
            batch = build([self.samples[index] for index in indices], indices)
            yield context_part(batch).to(device.device())

    def _estimate(self, sums: np.ndarray, tokens: np.ndarray) -> Estimate:
        mean = float(sums.sum() / tokens.sum())
        per_sequence = sums / tokens
        error = float(per_sequence.std(ddof=1) / math.sqrt(len(sums))) if len(sums) > 1 else None
        bits = mean / math.log(2) / self.bytes_per_token if self.bytes_per_token else None
        return {"mean": mean, "se": error, "bits_per_byte": bits}


def bytes_per_token(prefixes: list[str]) -> float | None:
    """Bytes of text per token of the corpora; None when one was not prepared here and nobody counted."""
    sidecars = [read_sidecar(prefix) for prefix in prefixes]
    counted = [sidecar for sidecar in sidecars if sidecar is not None]
    if len(counted) < len(sidecars):
        return None
    return sum(sidecar["bytes"] for sidecar in counted) / sum(sidecar["tokens"] for sidecar in counted)


def entropies(samples: list[PackedSample]) -> dict[str, float]:
    """Unigram entropy H(x_i) and bigram entropy H(x_i | x_{i-1}) of the text itself, nats per token."""
    tokens, previous, following = [], [], []
    for sample in samples:
        tokens.append(sample.tokens)
        inside = np.setdiff1d(np.arange(len(sample.tokens)), sample.cu_seqlens[1:] - 1)
        previous.append(sample.tokens[inside])
        following.append(sample.tokens[inside + 1])
    first, second = np.concatenate(previous), np.concatenate(following)
    joint = _entropy(first * (int(max(first.max(), second.max())) + 1) + second)
    return {"unigram": _entropy(np.concatenate(tokens)), "bigram": joint - _entropy(first)}


def _entropy(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log(share)).sum())


def _batch(inputs: Any, weights: np.ndarray) -> MicroBatch:
    no_bin = torch.zeros(len(weights), dtype=torch.int64)
    return MicroBatch(inputs, torch.from_numpy(weights), 0, no_bin, no_bin)


def _forward(batches: Iterator[MicroBatch], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    output, part = forward_step(batches, model)
    return output, partial(_sample_sums, part.args[0])


def _sample_sums(
    batch: MicroBatch, cross_entropy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    samples = batch.inputs.tokens.shape[0]
    sums = cross_entropy.new_zeros(samples, dtype=torch.float64)
    sums.index_add_(0, batch.inputs.outputs % samples, cross_entropy.double() * batch.weights)
    return cross_entropy.sum(), torch.ones((), dtype=torch.int, device=sums.device), sums


class _evaluating:
    """eval mode without gradients, and back."""

    def __init__(self, model: list[torch.nn.Module]) -> None:
        self.model, self.no_grad = model, torch.no_grad()

    def __enter__(self) -> None:
        self.no_grad.__enter__()
        for chunk in self.model:
            chunk.eval()

    def __exit__(self, *exception: Any) -> None:
        for chunk in self.model:
            chunk.train()
        self.no_grad.__exit__(*exception)


def checkpoint_metrics(
    bounds: dict[str, Estimate], autoregressive: dict[str, Any] | None
) -> dict[str, float]:
    """What a manifest says of an evaluation: `nll_block4`, ..., `nll_ar`; without what is not finite."""
    figures = {f"nll_block{size}": bound["mean"] for size, bound in bounds.items()}
    figures["nll_ar"] = autoregressive["nll"] if autoregressive else None
    return {name: value for name, value in figures.items() if value is not None and math.isfinite(value)}


def evaluate_checkpoint(config: Config, checkpoint: Path, metrics: list[str]) -> dict[str, float]:
    """The named metrics of a checkpoint's weights, by the run's own evaluation; every rank calls it."""
    device.seed_everything(config.run.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=threads_per_process(config.layout.processes))
    try:
        evaluator = Evaluator(config, load_model(config, checkpoint))
        sizes = [name.removeprefix("nll_block") for name in metrics if name != "nll_ar"]
        bounds = {size: evaluator.bound(int(size)) for size in sizes}
        autoregressive = {"nll": evaluator.autoregressive()["mean"]} if "nll_ar" in metrics else None
        return checkpoint_metrics(bounds, autoregressive)
    finally:
        groups.destroy()
