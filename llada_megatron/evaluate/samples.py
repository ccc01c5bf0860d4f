"""Held-out text with holes, filled in by the model: samples for the eye."""

from __future__ import annotations

from collections.abc import Iterator

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
) -> Iterator[tuple[str, str, str]]:
    """(original, masked, filled) texts of held-out sequences, half masked in their second half.

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
    filled = iter(result.tokens for result in results)
    for sample, tokens in zip(samples, masked, strict=True):
        text = np.concatenate([next(filled) for _ in sample.cu_seqlens[1:]])
        shown = [
            MASK_CHARACTER if t == mask_token_id else tokenizer.decode([int(t)]) for t in tokens.tolist()
        ]
        yield tokenizer.decode(sample.tokens.tolist()), "".join(shown), tokenizer.decode(text.tolist())
