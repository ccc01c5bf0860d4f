"""The reference of a preference, once: the bound of every text of a corpus under a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import Config
from llada_megatron.data.corpus import read_index
from llada_megatron.data.packed import build_sequences
from llada_megatron.objectives import passes
from llada_megatron.objectives.batch import MicroBatch, context_part
from llada_megatron.objectives.preference import Preference, bounds
from llada_megatron.parallel import groups
from llada_megatron.parallel.dealing import even_parts
from llada_megatron.runtime import device
from llada_megatron.runtime.launch import threads_per_process


def score_checkpoint(config: Config, checkpoint: Path, block_size: int) -> np.ndarray:
    """Bounds float64 [documents, draws] of the corpus that is config.data.path, NaN for texts left out.

    For every rank of config.layout, which need not be the layout that saved; the same on each.
    """
    device.seed_everything(config.run.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=threads_per_process(config.layout.processes))
    try:
        return bounds_of(config, load_model(config, checkpoint), block_size)
    finally:
        groups.destroy()


def bounds_of(config: Config, model: Sequence[torch.nn.Module], block_size: int) -> np.ndarray:
    """As `score_checkpoint`, of a model in process groups that exist."""
    objective = Preference("preference", config, schedule_of(config))
    data = build_sequences(
        config.data,
        split="train",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
        sequences_wanted=0,
    )
    draws, layout = config.preference.draws, config.layout
    parts = even_parts(
        data.sequences_per_epoch, layout.micro_batch // draws, layout.pp if layout.vpp > 1 else 1
    )
    samples = [[s * draws + draw for s in part for draw in range(draws)] for part in parts]
    scored: list[list[int]] = []  # documents of each micro-batch

    def batches(chunk: int) -> Iterator[MicroBatch]:  # one at a time: a corpus has more than a host holds
        for indices in samples:
            batch, texts = objective.scored(data, indices, block_size)
            if chunk == 0:
                scored.append([document for _, document in texts])
            batch.inputs.readout = objective.readout
            yield context_part(batch).to(device.device())

    length = config.data.sequence_length
    found = passes.forward_only(
        model,
        [batches(chunk) for chunk in range(len(model))],
        bounds,
        num_microbatches=len(parts),
        seq_length=length if block_size == length else 2 * length,
        micro_batch_size=layout.micro_batch,
    )
    documents = len(read_index(config.data.path[0]).document_lengths)
    totals = torch.zeros(documents, draws, dtype=torch.float64, device=device.device())
    covered = torch.zeros_like(totals)
    for numbers, sums in zip(scored, found, strict=False):  # nothing was found on the earlier pp_stages
        totals[numbers] = sums.reshape(draws, -1).T
        # Context-parallel ranks hold parts of the same texts: the parts add up to one covering.
        covered[numbers] = float(parallel_state.get_context_parallel_rank() == 0)
    for tensor in (totals, covered):
        dist.all_reduce(tensor, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        dist.all_reduce(tensor, group=parallel_state.get_pipeline_model_parallel_group())
    return (totals / covered).cpu().numpy()
