"""Small corpora of chats and of preferences, and runs on them."""

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.data.documents import Preparation
from llada_megatron.data.fingerprint import fingerprint
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.objectives.reference import scored_under, write_scores
from tests.distributed import run_ranks

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "home"]
OBJECTIVES = {"sft": "diffusion", "cap": "confidence", "dpo": "preference"}
L, BLOCK = 128, 8


def text(random: Random, least: int, most: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(random.randint(least, most)))


def chat(random: Random) -> dict:
    turns = [
        {"role": role, "content": text(random, 1, 4)}
        for _ in range(random.randint(1, 2))
        for role in ("user", "assistant")
    ]
    return {"messages": turns}


def pair(random: Random) -> dict:
    return {
        "prompt": text(random, 1, 3),
        "chosen": text(random, 1, 5),
        "rejected": text(random, 6, 8),
    }


def write(folder: Path, format: str, count: int = 60) -> str:
    """A prepared corpus of bytes under the template `plain`."""
    random, make = Random(0), {"chat": chat, "preference": pair}[format]
    records = folder / f"{format}.jsonl"
    records.write_text("".join(json.dumps(make(random)) + "\n" for _ in range(count)))
    prepare_corpus([records], folder / format, Preparation(format=format), workers=1)
    return str(folder / format)


def settings(corpus: str, name: str, *overrides: str) -> list[str]:
    """Overrides for two steps of 8 samples of an objective on a small model."""
    stage = f"{{name: {name}, block_size: '{BLOCK}', tokens: {16 * L}, objective: {OBJECTIVES[name]}}}"
    return [
        "experiment=parity",
        "diffusion=sft",
        f"data.path=[{corpus}]",
        "data.split='9,1'",
        f"data.sequence_length={L}",
        f"data.pad_to={BLOCK}",
        f"schedule.stages=[{stage}]",
        "diffusion.embedding_noise.sigma_over_rms=0",
        "model.hidden_size=64",
        "model.head_dim=16",
        "model.expert_hidden_size=32",
        "model.head_chunk_tokens=48",
        "optimizer.warmup_tokens=0",
        "layout.micro_batch=2",
        "layout.global_batch=8",
        *overrides,
    ]


def configure(corpus: str, name: str, *overrides: str) -> Config:
    """The run that `settings` describe."""
    return compose(settings(corpus, name, *overrides))


def reference_bounds(config: Config, seed: int) -> np.ndarray:
    """Those of the initial weights of a seed, under the masks of the run's seed."""
    from llada_megatron.evaluate.score import bounds_of
    from llada_megatron.model.provider import build_model
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    model = build_model(replace(config, run=replace(config.run, seed=seed)))
    return bounds_of(replace(config, data=replace(config.data, split="1,0")), model, BLOCK)


def score(config: Config, pairs: str, seed: int = 2, **said: Any) -> None:
    """Write the scores of another model than the one that is trained: of another seed."""
    [bounds] = run_ranks(reference_bounds, config, seed)
    of = {"checkpoint": f"initial weights {seed}", "tokens": fingerprint(config.data)["corpora"][0]}
    write_scores(pairs, bounds, of | scored_under(config, BLOCK) | said)
