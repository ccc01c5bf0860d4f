"""Whole runs of experiment=parity, in ranks forked for them, on a corpus of short documents (conftest.py)."""

import json
import shutil
from pathlib import Path

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from tests.distributed import run_ranks

STEPS = 6
STAGES = (
    "schedule.stages=[{name: bdlm_4, block_size: '4', tokens: 512},"
    " {name: bdlm_16, block_size: '16', tokens: 512}, {name: mdlm, block_size: full, tokens: 512}]"
)
LONG = "schedule.stages=[{name: bdlm_4, block_size: '4', tokens: 2560000}]"
SMALL = [
    "model.hidden_size=64",
    "model.head_dim=16",
    "model.ffn_hidden_size=64",
    "model.expert_hidden_size=32",
]
TWO = "layout.processes=2"
NEVER_THE_SAME = ("tokens_per_sec", "mfu", "peak_memory_bytes")


def configure(corpus: str, run_dir: Path, *overrides: str) -> Config:
    return compose(
        [
            "experiment=parity",
            *SMALL,
            f"data.path=[{corpus}]",
            "data.sequence_length=64",
            "data.split='8,2'",
            f"run.dir={run_dir}",
            "layout.global_batch=4",
            "optimizer.warmup_tokens=512",
            "training.threads=1",
            "diffusion.embedding_noise.fade_tokens=1024",
            STAGES,
            *overrides,
        ]
    )


def train_rank(configs) -> list[tuple[int, int, bool]]:
    from llada_megatron.training import loop

    outcomes = [loop.run(config) for config in configs]
    return [(outcome.step, outcome.signal, outcome.finished) for outcome in outcomes]


def train(*configs) -> list[tuple[int, int, bool]]:
    """Outcomes of runs that follow each other in the same forked ranks."""
    ranks = run_ranks(train_rank, configs, processes=configs[0].layout.processes)
    assert all(outcomes == ranks[0] for outcomes in ranks)
    return ranks[0]


def records(run_dir: Path, file: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (run_dir / f"{file}.jsonl").read_text().splitlines()]


def comparable(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in NEVER_THE_SAME} for record in records(run_dir)]


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def arrays_in(folders: list[Path]) -> list[dict[str, bytes]]:
    """Every tensor of checkpoints, weights and optimizer state, as bytes."""
    from megatron.core import dist_checkpointing

    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    def leaves(node, name=""):
        if isinstance(node, dict):
            return {k: v for key, value in node.items() for k, v in leaves(value, f"{name}/{key}").items()}
        return {name: node.contiguous().numpy().tobytes()} if hasattr(node, "numpy") else {}

    groups.initialize(LayoutConfig())
    return [
        {
            name: array
            for part in ("shards", "optimizer")
            for name, array in leaves(dist_checkpointing.load_plain_tensors(str(folder / part))).items()
        }
        for folder in folders
    ]


def assert_equal_within_rounding(run_dir: Path, straight: Path) -> None:
    for mine, theirs in zip(records(run_dir), records(straight), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=2e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["load_max_over_mean"] == theirs["load_max_over_mean"]


def copy_corpus(corpus: str, folder: Path) -> str:
    for suffix in ("bin", "idx", "json"):
        shutil.copy(f"{corpus}.{suffix}", folder / f"text.{suffix}")
    return f"{folder}/text"
