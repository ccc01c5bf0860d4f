"""Held-out text with holes, filled in by the model: samples for the eye."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.generate import Decoder, Limits, Prompt
from llada_megatron.generate.prompt import BlockChanged, Result
from llada_megatron.generate.rules import rule_of
from llada_megatron.generate.trace import GIVEN, Trace, pieces_of
from llada_megatron.objectives.passes import evaluating
from llada_megatron.parallel.random import Purpose, generator
from llada_megatron.parallel.ranks import gathered

MASK_CHARACTER = "░"


def infilled(
    config: Config, model: torch.nn.Module, samples: list[PackedSample], block_size: int
) -> Iterator[dict[str, Any]]:
    """`original`, `masked` and `filled` texts of held-out sequences, half masked in their second half.

    `pieces` are the filled text's, with the forward that decided each (generate/trace.py). Each document is
    decoded by itself, its blocks counted from its first token, as a prompt's are. Every rank calls it with
    the same samples, and has all texts.
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
    filled, trace = {}, Trace()
    with evaluating([model]):
        prompts = [Prompt(tokens, has_holes=True) for tokens in documents]
        for event in decoder.run(prompts, Limits(new_tokens=0)):
            if isinstance(event, BlockChanged):
                trace.add(event)
            elif isinstance(event, Result):
                filled[event.prompt] = event.tokens
    known = {number: decided for part in gathered(trace.decisions) for number, decided in part.items()}
    numbers = itertools.count()
    for sample, tokens in zip(samples, masked, strict=True):
        mine = [next(numbers) for _ in sample.cu_seqlens[1:]]
        text = np.concatenate([filled[number] for number in mine])
        decisions = [
            known[number][at] if documents[number][at] == mask_token_id else GIVEN
            for number in mine
            for at in range(len(documents[number]))
        ]
        shown = [
            MASK_CHARACTER if t == mask_token_id else tokenizer.decode([int(t)]) for t in tokens.tolist()
        ]
        yield {
            "original": tokenizer.decode(sample.tokens.tolist()),
            "masked": "".join(shown),
            "filled": tokenizer.decode(text.tolist()),
            "pieces": pieces_of(text.tolist(), decisions, tokenizer.decode),
        }
