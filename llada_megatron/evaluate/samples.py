"""Held-out text with holes, filled in by the model: samples for the eye."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate import Decoder, Limits, Prompt
from llada_megatron.generate.rules import rule_of
from llada_megatron.objectives.passes import evaluating
from llada_megatron.parallel.random import Purpose, generator

MASK_CHARACTER = "░"


def infilled(
    config: Config, model: torch.nn.Module, samples: list[PackedSample], block_size: int
) -> Iterator[dict[str, Any]]:
    """Held-out sequences, half masked in their second half: texts `original`, `masked` and `filled`, the
    tokens of the last one as `pieces` of text, and `decided_at`, the forward of its document that decided
    each, 0 for those that were given.

    Each document is decoded by itself, its blocks counted from its first token, as a prompt's are. Every rank
    calls it with the same samples, and has all texts.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    mask_token_id, length = config.model.mask_token_id, config.data.sequence_length
    masked, documents = [], []
    for index, sample in enumerate(samples):
        score = generator(config.run.seed, Purpose.EVALUATION_INFILL, index).random(length)
        hidden = (score < 0.5) & (np.arange(length) >= length // 2)
        masked.append(np.where(hidden, mask_token_id, sample.tokens))
        documents += np.split(masked[-1], sample.cu_seqlens[1:-1])
    decoder = Decoder(
        model,
        rule_of("threshold"),
        block_size=block_size,
        mask_token_id=mask_token_id,
        context=length,
    )
    with evaluating([model]):
        results = decoder.results(
            [Prompt(tokens, has_holes=True) for tokens in documents], Limits(new_tokens=0)
        )
    remaining = iter(results)
    for sample, tokens in zip(samples, masked, strict=True):
        of_sample = [next(remaining) for _ in sample.cu_seqlens[1:]]
        filled = np.concatenate([result.tokens for result in of_sample]).tolist()
        pieces = [tokenizer.decode([token]) for token in filled]
        shown = [
            MASK_CHARACTER if token == mask_token_id else piece
            for token, piece in zip(tokens.tolist(), pieces, strict=True)
        ]
        yield {
            "original": tokenizer.decode(sample.tokens.tolist()),
            "masked": "".join(shown),
            "filled": tokenizer.decode(filled),
            "pieces": pieces,
            "decided_at": np.concatenate([result.decided_at for result in of_sample]).tolist(),
        }
