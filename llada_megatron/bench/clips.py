"""Losses of a trained model over mask rates, on held-out text, for objectives/clips.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from llada_megatron.attention.mask import block_starts
from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.colours import VERMILION
from llada_megatron.config.schema import Config, LayoutConfig, RatePer
from llada_megatron.data.packed import PackedSample
from llada_megatron.evaluate.likelihood import Evaluator
from llada_megatron.objectives.clips import LEAST_RATE, Clip, best, clips_of
from llada_megatron.objectives.corruption import corrupt
from llada_megatron.objectives.diffusion import diffusion_inputs
from llada_megatron.observe.plots import STYLE
from llada_megatron.parallel import groups
from llada_megatron.record.json_files import write_json


def run(
    config: Config, checkpoint: Path, block_sizes: Sequence[int], *, draws: int, out: Path | None
) -> dict[str, Any]:
    """Measure, print, and write OUT/clips.json with a picture; one process.

    Raises BadInput for draws so few that some clip has none.
    """
    groups.initialize(LayoutConfig(), threads=config.training.threads)
    try:
        evaluator = Evaluator(config, load_model(config, checkpoint))
        measured = {}
        for size in block_sizes:
            rates, losses = block_losses(evaluator, size, draws)
            measured[size] = clips_of(rates, losses, [scored_tokens(one) for one in evaluator.samples])
    finally:
        groups.destroy()
    record = {
        "checkpoint": str(checkpoint),
        "sequences": len(evaluator.samples),
        "draws": draws,
        "clips": {str(size): [asdict(clip) for clip in clips] for size, clips in measured.items()},
    }
    _print(measured)
    if out is not None:
        write_json(out / "clips.json", record)
        plot(measured, out / "clips.png")
        print(f"{out}/clips.json, {out}/clips.png")
    return record


@torch.inference_mode()
def block_losses(evaluator: Evaluator, block_size: int, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """Rates and losses, sum over masked tokens of CE/t, of the held-out sequences' blocks.

    Each float64 [D, blocks of all sequences].
    """
    config, model = evaluator.config, evaluator.model[0].eval()
    unclipped = replace(
        config.diffusion,
        t_per=RatePer.block,
        antithetic=False,
        resample=False,
        mask_rate_min=LEAST_RATE,
        mask_rate_max=1.0,
        complementary=False,
    )
    rates: list[np.ndarray] = []
    losses: list[np.ndarray] = []
    for draw in range(draws):
        for index, sample in enumerate(evaluator.samples):
            number = draw * len(evaluator.samples) + index
            masks = corrupt(
                config.run.seed, number, sample.cu_seqlens, block_size, unclipped, sample.supervised
            )
            starts = block_starts(sample.cu_seqlens, block_size, unclipped.block_grid)
            first, block = np.unique(starts, return_inverse=True)
            inputs = diffusion_inputs(
                [sample],
                [masks.masked],
                block_size=block_size,
                grid=unclipped.block_grid,
                mask_token_id=config.model.mask_token_id,
            )
            weighted = model(inputs).double().cpu().numpy() / masks.rate[masks.masked]
            rates.append(masks.rate[first])
            losses.append(np.bincount(block[masks.masked], weighted, minlength=len(first)))
    return np.concatenate(rates).reshape(draws, -1), np.concatenate(losses).reshape(draws, -1)


def scored_tokens(sample: PackedSample) -> int:
    """All of a text, the answers of chats."""
    return len(sample.tokens) if sample.supervised is None else int(sample.supervised.sum())


def plot(measured: dict[int, list[Clip]], path: Path) -> None:
    """A PNG: for each block size the variance over the clip's ends, the best clip marked."""
    with rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(1 + 4 * len(measured), 4.2), layout="constrained")
        panels = figure.subplots(1, len(measured), squeeze=False)[0]
        for axes, (size, clips) in zip(panels, measured.items(), strict=True):
            clipped, least = clips[1:], best(clips[1:])
            lows, highs = [clip.low for clip in clipped], [clip.high for clip in clipped]
            dots = axes.scatter(
                lows, highs, c=[clip.variance for clip in clipped], s=150, marker="s", cmap="viridis"
            )
            axes.scatter(
                least.low, least.high, s=190, marker="s", facecolors="none", edgecolors=VERMILION, lw=2
            )
            axes.set_title(f"block {size}: least at {least.low:g} to {least.high:g}", loc="left")
            axes.set_xlabel("least mask rate")
            axes.set_ylabel("largest mask rate")
            figure.colorbar(dots, ax=axes, label="variance of the loss, nats²")
        figure.savefig(path, dpi=120)


def _print(measured: dict[int, list[Clip]]) -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("mask rates", no_wrap=True)
    for size in measured:
        table.add_column(f"block {size}", justify="right")
    least = {size: best(clips) for size, clips in measured.items()}
    for row in zip(*measured.values(), strict=True):
        cells = [
            f"[bold]{clip.variance:.4f}[/]" if clip is least[size] else f"{clip.variance:.4f}"
            for size, clip in zip(measured, row, strict=True)
        ]
        table.add_row(f"{row[0].low:g} to {row[0].high:g}", *cells)
    console = Console(highlight=False, soft_wrap=True)
    console.print("variance over masks of a sequence's loss per token, nats²; the least is bold")
    console.print(table)
    for size, clip in least.items():
        rates = f"diffusion.mask_rate_min={clip.low:g} diffusion.mask_rate_max={clip.high:g}"
        console.print(f"block {size}: {rates}")
