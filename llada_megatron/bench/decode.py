"""Decoding with the cache against decoding without it and against the least that a forward takes.

For each rule the same prompts are decoded by `Decoder`, one at a time and in a batch, and by the loop without
a cache, whose tokens they must equal, unless the cache is an approximation (generate/full.py). The bound of
the first is one forward of a block's rows alone for each forward that there was: its matrix products read
every weight that the rows need, history or not (of the family dlcm all but the backbone's). Seconds on a CPU
are those that one thread computed, so that other processes cost nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import unwrap_model

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.attention.keys import PoolPart
from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import so_many
from llada_megatron.config.schema import Config, LayoutConfig
from llada_megatron.data.packed import build_sequences
from llada_megatron.generate import Limits, Prompt, Result
from llada_megatron.generate.full import full_attention_of, kind_of
from llada_megatron.generate.methods import Method, method_of
from llada_megatron.generate.next_tokens import NextTokenDecoder
from llada_megatron.generate.reference_loop import Canvas, next_tokens, recomputed, reference_loop
from llada_megatron.generate.rules import rule_of
from llada_megatron.generate.running import Running
from llada_megatron.model.concept_cache import CachedConcepts, ConceptCache
from llada_megatron.model.dlcm import DynamicConcepts
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.provider import build_model
from llada_megatron.parallel import groups
from llada_megatron.record.json_files import write_json
from llada_megatron.runtime import device

FORWARDS = 15
"""Of which the bound takes the median."""


@dataclass(frozen=True)
class Setting:
    """What is decoded."""

    rules: Sequence[str]
    block_size: int
    """0: the model predicts next tokens."""
    prompt_tokens: int
    new_tokens: int
    batch: int
    full: Mapping[str, str] | None = None
    """Settings of `full_attention_of`; None: blocks see no later one."""
    cuda_graphs: bool = False
    """Of the decoder; the seconds that making them takes count."""


@dataclass(frozen=True)
class Measured:
    """One rule."""

    name: str
    tokens_equal: bool
    agreement: float
    """Share of tokens that are those without a cache."""
    tokens_per_forward: float
    forward_sec: float
    """One prompt at a time: seconds of a forward and of what is decided after it."""
    tokens_per_sec: float
    """One prompt at a time."""
    uncached_tokens_per_sec: float
    speedup: float
    share_of_bound: float
    """Seconds of one forward of a block's rows for each forward, over the seconds that decoding took."""
    backbone_share: float | None
    """Of the family dlcm: forwards of one prompt in which the backbone ran, over all of them."""
    batch: int
    batch_tokens_per_sec: float
    batch_speedup: float


def run(config: Config, checkpoint: Path | None, setting: Setting, json_file: Path | None) -> int:
    """Measure, print, write; 0 when every rule's tokens equal those without a cache, else 1.

    Without a checkpoint the weights are a run's first. Raises BadInput for prompts that do not fit.
    """
    orders = config.levenshtein.orders
    methods = {name: method_of(name, of_checkpoint=orders) for name in setting.rules}
    is_exact = setting.full is None or full_attention_of(setting.full).is_exact
    length = config.data.sequence_length
    if setting.prompt_tokens + setting.new_tokens > length:
        raise BadInput(
            f"{setting.prompt_tokens} tokens of a prompt and {setting.new_tokens} new ones are more than the"
            f" context of {length}: ask for fewer (--prompt-tokens, --new-tokens)."
        )
    groups.initialize(LayoutConfig(), threads=1)
    try:
        stages = load_model(config, checkpoint) if checkpoint else build_model(config)
        model = stages[0].eval().requires_grad_(False)
        prompts = _prompts(config, setting)
        bound = forward_seconds(model, setting.block_size or 1)
        found = [
            _measure(model, config, setting, name, method, prompts, bound) for name, method in methods.items()
        ]
    finally:
        groups.destroy()
    record = {
        "device": device.name(),
        "block_size": setting.block_size,
        "prompt_tokens": setting.prompt_tokens,
        "new_tokens": setting.new_tokens,
        "full_attention": setting.full,
        "is_exact": is_exact,
        "cuda_graphs": setting.cuda_graphs,
        "forward_sec": bound,
        "rules": [asdict(one) for one in found],
    }
    write_json(json_file, record)
    _print(record)
    return 0 if not is_exact or all(one.tokens_equal for one in found) else 1


@torch.inference_mode()
def forward_seconds(model: torch.nn.Module, rows: int) -> float:
    """Median seconds of a forward of so many rows that see each other alone, their head included.

    Of the family dlcm as they are decoded, in a forward that opens no concept.
    """
    at, keys = device.device(), None
    if isinstance(unwrap_model(model), DynamicConcepts):
        keys = CachedConcepts(ConceptCache(0, 1), [PoolPart(0, np.zeros(rows, np.int64))]).to(at)
    inputs = ModelInputs(
        tokens=torch.arange(rows, device=at)[None],
        positions=torch.arange(rows, device=at)[None],
        keys=keys
        or ContextShard(BlockDiffusionMask([torch.tensor([0, rows])], rows, clean_copy=False, causal=True)),
        outputs=torch.arange(rows, device=at),
        readout=rule_of("threshold").figures.readout(0),
    )
    seconds = [device.timed(lambda: model(inputs))[1] for _ in range(2 * FORWARDS)]
    return statistics.median(seconds[FORWARDS:])  # the first ones warm up


def _prompts(config: Config, setting: Setting) -> list[np.ndarray]:
    """Beginnings of held-out sequences; without a corpus any tokens."""
    if not config.data.path:
        generator = np.random.default_rng(config.run.seed)
        highest = min(config.model.mask_token_id, config.model.vocab_size)
        return [generator.integers(0, highest, setting.prompt_tokens) for _ in range(setting.batch)]
    data = build_sequences(
        config.data,
        split="validation",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
    )
    return [data[index].tokens[: setting.prompt_tokens] for index in range(setting.batch)]


def _measure(
    model: torch.nn.Module,
    config: Config,
    setting: Setting,
    name: str,
    method: Method,
    prompts: list[np.ndarray],
    bound: float,
) -> Measured:
    alone, alone_sec, share = _decoded(model, config, setting, method, prompts[:1], batch=1)
    together, together_sec, _ = _decoded(model, config, setting, method, prompts, batch=setting.batch)
    expected, uncached_sec = device.timed(lambda: uncached(model, config, setting, method, prompts[0]))
    agreement = float(np.mean([result.tokens == expected for result in (alone[0], together[0])]))
    speed, batch_speed = len(expected) / alone_sec, len(together) * len(expected) / together_sec
    uncached_speed = len(expected) / uncached_sec
    return Measured(
        name,
        agreement == 1,
        agreement,
        alone[0].tokens_per_forward,
        alone_sec / alone[0].forwards["denoise"],
        speed,
        uncached_speed,
        speed / uncached_speed,
        bound * alone[0].forwards["denoise"] / alone_sec,
        share,
        setting.batch,
        batch_speed,
        batch_speed / speed,
    )


def uncached(
    model: torch.nn.Module, config: Config, setting: Setting, method: Method, prompt: np.ndarray
) -> np.ndarray:
    """The tokens behind a prompt, every forward computed anew."""
    mask = config.model.mask_token_id
    if not setting.block_size:
        return next_tokens(model, prompt, setting.new_tokens, method.rule, mask_token_id=mask)
    if setting.full is None:
        running = Running(
            0,
            Prompt(prompt),
            Limits(new_tokens=setting.new_tokens),
            block_size=setting.block_size,
            mask_token_id=mask,
            context=config.data.sequence_length,
        )
        return recomputed(model, running, method).tokens
    tokens = np.concatenate([prompt, np.full(setting.new_tokens, mask)])
    canvas = Canvas(tokens, setting.block_size, mask, full_from=len(prompt))
    return reference_loop(model, canvas, method.rule)[0][len(prompt) :]


def _decoded(
    model: torch.nn.Module,
    config: Config,
    setting: Setting,
    method: Method,
    prompts: list[np.ndarray],
    *,
    batch: int,
) -> tuple[list[Result], float, float | None]:
    """The results of a new decoder, the seconds that they took, and `Measured.backbone_share`."""
    full = None if setting.full is None else full_attention_of(setting.full)
    decoder = kind_of(full, next_tokens=not setting.block_size)(
        model,
        method.rule,
        buffer=method.buffer,
        lookahead=method.lookahead,
        block_size=setting.block_size,
        mask_token_id=config.model.mask_token_id,
        context=config.data.sequence_length,
        batch=batch,
        cuda_graphs=setting.cuda_graphs,
    )
    results, seconds = device.timed(lambda: decoder.results(prompts, Limits(new_tokens=setting.new_tokens)))
    concepts = decoder.concepts if isinstance(decoder, NextTokenDecoder) else None
    share = None if concepts is None else concepts.backbone_forwards / decoder.counts.forwards
    return results, seconds, share


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    size = record["block_size"]
    console.print(
        f"{record['device']}: {f'blocks of {size}' if size else 'next tokens'}, {record['new_tokens']} new"
        f" ones behind {record['prompt_tokens']}; a forward of {so_many(size or 1, 'row')} alone takes"
        f" {record['forward_sec'] * 1e3:.1f} ms; batched: {record['rules'][0]['batch']} prompts at a time",
        soft_wrap=True,
    )

    def part(one: dict[str, Any]) -> str:
        return f"{int(100 * one['agreement'])}%"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "equal": lambda one: "yes" if one["tokens_equal"] else "NO" if record["is_exact"] else part(one),
        "tok/fwd": lambda one: f"{one['tokens_per_forward']:.2f}",
        "ms/fwd": lambda one: f"{one['forward_sec'] * 1e3:.1f}",
        "uncached": lambda one: f"{one['uncached_tokens_per_sec']:.1f}",
        "tok/s": lambda one: f"{one['tokens_per_sec']:.1f}",
        "times": lambda one: f"{one['speedup']:.1f}",
        "bound": lambda one: f"{one['share_of_bound']:.2f}",
        "batched": lambda one: f"{one['batch_tokens_per_sec']:.1f}",
        "gain": lambda one: f"{one['batch_speedup']:.1f}",
    }
    if record["rules"][0]["backbone_share"] is not None:
        columns["backbone"] = lambda one: f"{one['backbone_share']:.2f}"
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    table.add_column("rule", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for one in record["rules"]:
        table.add_row(one["name"], *(shown(one) for shown in columns.values()))
    console.print(table)
