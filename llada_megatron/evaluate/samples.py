"""Held-out text with holes, filled in by the model: samples for the eye."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate.reference_loop import Canvas, reference_loop
from llada_megatron.generate.rules import rule_of
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
            grid = config.diffusion.block_grid
            canvas = Canvas(tokens.copy(), block_size, mask_token_id, grid, sample.cu_seqlens)
            filled, _ = reference_loop(model, canvas, rule_of("threshold"))
        shown = [
            MASK_CHARACTER if h else tokenizer.decode([int(t)]) for h, t in zip(hidden, tokens, strict=True)
        ]
        yield tokenizer.decode(sample.tokens.tolist()), "".join(shown), tokenizer.decode(filled.tolist())
