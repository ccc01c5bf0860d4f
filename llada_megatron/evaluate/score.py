"""The reference of a preference, once: the bound of every text of a corpus under a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import Config
from llada_megatron.data.corpus import read_index
from llada_megatron.data.packed import build_sequences
from llada_megatron.objectives.preference import Preference
from llada_megatron.parallel import groups
from llada_megatron.runtime import device


def score_checkpoint(config: Config, checkpoint: Path, block_size: int) -> np.ndarray:
    """Bounds float64 [documents, draws] of the corpus that is config.data.path, NaN for texts left out.

    For every rank of config.layout, which need not be the layout that saved; the same on each.
    """
    device.seed_everything(config.run.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=config.training.threads)
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
    )
    return objective.text_bounds(
        model,
        data,
        data.sequences_per_epoch,
        block_size,
        rows=len(read_index(config.data.path[0]).document_lengths),
        row_of=lambda corpus, document: document,
    )
