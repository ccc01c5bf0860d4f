"""A tiny model for the tests of decoding, and what the loop without a cache makes of a prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.generate.reference_loop import Canvas, reference_loop
from llada_megatron.generate.rules import Draws, Rule
from llada_megatron.model.provider import build_model

MASK = 500
CONTEXT = 96
BOLD_STD = 0.2
"""So large that every token that a row sees shows in its logits, which then differ by much."""


def settings(*overrides: str) -> Config:
    config = compose(["experiment=parity", "model=tiny", *overrides])
    return replace(config, model=replace(config.model, init_std=BOLD_STD))


def tiny(config: Config) -> torch.nn.Module:
    """The model of `settings` in the process groups that there are."""
    (model,) = build_model(config)
    return model.eval()


def prompt_of(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, length)).integers(0, 480, length)


def uncached(
    model: Any, prompt: np.ndarray, new: int, block_size: int, rule: Rule, *, number: int = 0, seed: int = 0
) -> tuple[np.ndarray, int]:
    """The `new` tokens behind a prompt, and the forwards that they took."""
    length = -(-(len(prompt) + new) // block_size) * block_size
    tokens = np.full(length, MASK)
    tokens[: len(prompt)] = prompt
    filled, forwards = reference_loop(model, Canvas(tokens, block_size, MASK), rule, Draws(seed, number))
    return filled[len(prompt) : len(prompt) + new], forwards
