"""Held-out text with holes, filled in by the model: samples for the eye."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate.infill import infill
from llada_megatron.objectives.passes import evaluating
from llada_megatron.parallel.random import Purpose, generator

MASK_CHARACTER = "░"


def infilled(
    config: Config, model: torch.nn.Module, samples: list[PackedSample], block_size: int
) -> Iterator[tuple[str, str, str]]:
    """(original, masked, filled) texts of held-out sequences, half masked in their second half."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    mask_token_id = config.model.mask_token_id
    for index, sample in enumerate(samples):
        length = len(sample.tokens)
        score = generator(config.run.seed, Purpose.EVALUATION_INFILL, index).random(length)
        hidden = (score < 0.5) & (np.arange(length) >= length // 2)
        tokens = np.where(hidden, mask_token_id, sample.tokens)
        with evaluating([model]):
            filled, _ = infill(
                model,
                tokens,
                block_size=block_size,
                mask_token_id=mask_token_id,
                grid=config.diffusion.block_grid,
                cu_seqlens=sample.cu_seqlens,
            )
        shown = [
            MASK_CHARACTER if h else tokenizer.decode([int(t)]) for h, t in zip(hidden, tokens, strict=True)
        ]
        yield tokenizer.decode(sample.tokens.tolist()), "".join(shown), tokenizer.decode(filled.tolist())
