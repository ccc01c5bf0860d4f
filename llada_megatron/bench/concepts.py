"""Attention of tokens to concepts, ragged against replicated: equal first, then timed.

Ragged has a key for each concept, so a row of the mask is no diagonal; replicated has one for each token, as
DLCM's kernels want it (arXiv 2512.24617, table 6), with log(copies) taken back (model/cross_attention.py).
`reference` is the masked formulation with every score.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llada_megatron.attention.registry import executor_names
from llada_megatron.config.errors import RunFailed
from llada_megatron.model.concepts import Segments
from llada_megatron.model.cross_attention import Sight, attend, sight
from llada_megatron.record.json_files import write_json
from llada_megatron.runtime import device

HEADS, HEAD_DIM, RATE = 8, 64, 0.25


def segments_of(tokens: int) -> Segments:
    """One document whose tokens open a concept with probability RATE."""
    opened = np.random.Generator(np.random.Philox(0)).random(tokens) < RATE
    opened[0] = True
    return Segments(opened, np.array([0]))


def run(tokens: int, rounds: int, json_file: Path | None) -> dict[str, Any]:
    """Compare, time, print, and write the figures; RunFailed where two forms differ."""
    at, dtype = device.device(), torch.bfloat16 if device.on_cuda() else torch.float32
    segments = segments_of(tokens)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(rows, 1, HEADS, HEAD_DIM, generator=generator).to(at, dtype).requires_grad_()
        for rows in (tokens, segments.count + 1, segments.count + 1)
    )
    cases: dict[str, Callable[[], Any]] = {}

    def passes(seen: Sight, backend: str) -> Any:
        """Forward and backward, the making of copies included."""
        entry = torch.from_numpy(seen.entry).to(at)
        keys, values = (each.index_select(0, entry) for each in (key, value))
        output = attend(query, keys, values, seen, backend)
        return output, *torch.autograd.grad(output.square().sum(), (query, key, value))

    for backend in executor_names(at, dtype, HEAD_DIM):
        for form in ("ragged", "replicated"):
            seen = sight(segments, own=False, replicated=form == "replicated")
            cases[f"{backend}, {form}"] = partial(passes, seen, backend)
    expected, limit = cases["reference, ragged"](), 2e-2 if dtype is torch.bfloat16 else 1e-4
    for name, case in cases.items():
        for ours, theirs in zip(case(), expected, strict=True):
            if float((ours - theirs).abs().max() / theirs.abs().max()) > limit:
                raise RunFailed(f"{name} differs from the dense mask by more than {limit:g}.")
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            times[name].append(device.timed(case)[1])
    figures = {name: 1e3 * statistics.median(each) for name, each in times.items()}
    print(f"{tokens} tokens, {segments.count} concepts, {HEADS} heads of {HEAD_DIM}, {dtype}, {at}")
    for name, milliseconds in figures.items():
        print(f"{name:<28}{milliseconds:>10.1f} ms")
    record = {"tokens": tokens, "concepts": segments.count, "dtype": str(dtype), "device": str(at)}
    write_json(json_file, {**record, "milliseconds": figures})
    return figures
