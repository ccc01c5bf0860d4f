"""Golden cases of BD3-LM: rates, masks, weights and losses from stored draws, and its search for a clip.

The mask token is never given, and L tokens of B sequences are N blocks in all. Legend: R rounds of draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention.mask import block_starts
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import BlockGrid, DiffusionConfig, Weight
from llada_megatron.data.packed import PackedSample
from llada_megatron.objectives.clips import of_blocks
from llada_megatron.objectives.corruption import Corruption, resampled, spread_evenly
from llada_megatron.verify.golden_cases import CaseResult, largest, relative
from llada_megatron.verify.golden_losses import (
    as_differentiated,
    backward,
    diffusion_objective,
    norm_differences,
)
from llada_megatron.verify.golden_set import REMEDY, Golden, Stored


def bd3lm_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """A training or evaluation loss.

    With another noise than `loglinear` t is no mask rate: masks and weights are then taken as stored. Where
    the first token is ignored in training its code counts it all the same.
    """
    stored = golden.stored.under(name)
    clean, noisy = (stored.ids(key, golden.model.vocab_size) for key in ("x0", "xt"))
    size = case["block_size"]
    if clean.shape != noisy.shape or clean.ndim != 2 or not size or clean.shape[1] % size:
        raise BadInput(f"cases.json/{name}: x0 and xt are no whole blocks of [B, L]: {REMEDY}.")
    B, L = clean.shape
    rates, weights = _rates(stored, case, B, L), _per_token(stored, "weight", clean).double().numpy()
    expected_masks = (noisy == golden.model.mask_token_id).numpy()
    maskable = np.ones((B, L), dtype=bool)
    maskable[:, 0] = not case["ignore_bos"]
    differences = {"rate": largest(torch.from_numpy(rates) - _per_token(stored, "t", clean))}
    if case["noise"] == "loglinear":
        masks = _masks(stored, case, rates, maskable)
        differences["mask"] = float((masks != expected_masks).sum())
    else:
        masks, rates = expected_masks, 1 / weights
    weight = Weight.flat if case["weight_is_one"] else Weight.inverse
    objective = diffusion_objective(golden, DiffusionConfig(weight=weight, gives_mask_token=False))
    document = np.array([0, L], dtype=np.int32)
    batch = objective.corrupted(
        [PackedSample(clean[b].numpy(), document, supervised=maskable[b]) for b in range(B)],
        [Corruption(masks[b], rates[b]) for b in range(B)],
        case["block_size"],
    )
    counted_too = case["ignore_bos"] and case["training"]
    with as_differentiated(golden, case):
        total, (output,) = backward(golden.stage, objective, [batch], share=(L - 1) / L if counted_too else 1)
    cross_entropies = stored.like("nlls", clean).double().numpy()[masks] / weights[masks]
    differences |= {
        "cross_entropy": largest(output.cpu() - torch.from_numpy(cross_entropies)),
        "loss": relative(total, case["loss"]),
    }
    norms = norm_differences(golden, case)
    return CaseResult(name, differences if norms is None else differences | {"grad_norms": norms})


def _per_token(stored: Stored, key: str, like: Tensor) -> Tensor:
    """[B, L], of which one number a sequence may be stored."""
    values = stored.needed(key)
    return values.expand(like.shape) if values.shape == (len(like), 1) else stored.like(key, like)


def _rates(stored: Stored, case: dict[str, Any], B: int, L: int) -> np.ndarray:
    """t float64 [B, L] from one draw for each block."""
    draws = stored.needed("block_draws").double().numpy()
    if draws.shape != (B, L // case["block_size"]):
        raise BadInput(f"cases.safetensors holds block_draws of shape {[*draws.shape]}: {REMEDY}.")
    if case["antithetic"]:
        draws = spread_evenly(draws.ravel()).reshape(draws.shape)
    low, high = case["mask_rate_min"], case["mask_rate_max"]
    return np.repeat(low + (high - low) * draws, case["block_size"], axis=1)


def _masks(stored: Stored, case: dict[str, Any], rates: np.ndarray, maskable: np.ndarray) -> np.ndarray:
    """bool [B, L] from R rounds of draws for every token."""
    rounds_RBL = stored.needed("mask_draws").numpy()
    B, L = rates.shape
    if rounds_RBL.shape[1:] != (B, L):
        raise BadInput(f"cases.safetensors holds mask_draws of shape {[*rounds_RBL.shape]}: {REMEDY}.")
    start = block_starts(np.array([0, L]), case["block_size"], BlockGrid.sequence)
    masks = np.empty((B, L), dtype=bool)
    for b in range(B):
        rounds = iter(rounds_RBL[:, b] <= rates[b])
        masks[b] = next(rounds) & maskable[b]
        if case["resample"]:
            clip = case["mask_rate_min"], case["mask_rate_max"]
            masks[b] = resampled(masks[b], partial(_next, rounds), start, maskable[b], clip)
    return masks


def _next(rounds: Iterator[np.ndarray]) -> np.ndarray:
    if (draws := next(rounds, None)) is None:
        raise BadInput(f"cases.safetensors holds too few rounds of mask_draws: {REMEDY}.")
    return draws


def search_case(golden: Golden, name: str, case: dict[str, Any]) -> CaseResult:
    """The sum over batches of the unbiased variance of each interval's losses; the least is chosen."""
    values = golden.stored.under(name).needed("values").double().numpy()  # [intervals, batches, draws]
    intervals, logged = case["intervals"], case["logged"]
    if not isinstance(logged, dict) or not len(intervals) == len(logged) == len(values):
        raise BadInput(f"cases.json/{name} does not say intervals and what was logged of each: {REMEDY}.")
    found = [of_blocks(losses.T, np.ones(losses.T.shape, dtype=bool))[1] for losses in values]
    chosen = torch.tensor(intervals[int(np.argmin([each.sum() for each in found]))])
    return CaseResult(
        name,
        {
            "variance": max(
                relative(each.mean(), value) for each, value in zip(found, logged.values(), strict=True)
            ),
            "chosen": largest(chosen - torch.tensor(case["chosen"])),
        },
    )
