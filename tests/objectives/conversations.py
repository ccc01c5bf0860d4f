"""Small corpora of chats and of preferences, and runs on them."""

import json
from pathlib import Path
from random import Random

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.data.documents import Preparation
from llada_megatron.data.prepare import prepare_corpus

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


def configure(corpus: str, name: str, *overrides: str) -> Config:
    """Two steps of 8 samples of an objective on a small model."""
    stage = f"{{name: {name}, block_size: '{BLOCK}', tokens: {16 * L}, objective: {OBJECTIVES[name]}}}"
    return compose(
        [
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
    )
