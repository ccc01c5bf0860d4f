"""What a run trained on, written down while it trains: sample indices, mask rates and masks."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import Config, LayoutConfig


def train_and_record(config: Config, folder: Path) -> int:
    """Train this rank's part of a run, with a file of its own; returns the signal that stopped it."""
    from llada_megatron.objectives import batch
    from llada_megatron.training import loop, step

    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / f"{os.environ['RANK']}_{os.getpid()}.jsonl").open("w")

    def record(entry: dict[str, Any]) -> None:
        file.write(json.dumps(entry) + "\n")
        file.flush()

    deal, corrupt = step.sample_indices, batch.corrupt

    def recorded_deal(*arguments: Any) -> list[list[int]]:
        dealt = deal(*arguments)
        record({"samples": sorted(index for indices in dealt for index in indices)})
        return dealt

    def recorded_corrupt(seed: int, index: int, *arguments: Any) -> Any:
        corruption = corrupt(seed, index, *arguments)
        digest = hashlib.sha256(corruption.rate.tobytes() + corruption.masked.tobytes())
        record({"sample": index, "noise_sha256": digest.hexdigest()})
        return corruption

    step.sample_indices = recorded_deal  # type: ignore[assignment]
    batch.corrupt = recorded_corrupt  # type: ignore[assignment]
    with file:
        return loop.run(config).signal


class Journal:
    """The union of what every process of a run's attempts wrote; a sample trained again must be the same."""

    def __init__(self, folder: Path) -> None:
        self.samples: set[int] = set()
        self.noise: dict[int, str] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                self._add(line)

    def _add(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            return
        self.samples.update(entry.get("samples", []))
        if "sample" in entry:
            known = self.noise.setdefault(entry["sample"], entry["noise_sha256"])
            if known != entry["noise_sha256"]:
                raise RunFailed(f"Sample {entry['sample']} was corrupted in two ways.")

    def samples_sha256(self) -> str:
        """Of the indices of all samples, in order."""
        return _digest(sorted(self.samples))

    def noise_sha256(self) -> str:
        """Of t and the masks of all samples, in sample order."""
        return _digest([[index, self.noise[index]] for index in sorted(self.noise)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def state_sha256(checkpoint: Path) -> str:
    """Of every tensor of a checkpoint by name: weights, moments, masters and expert biases. One process."""
    import torch

    from llada_megatron.parallel import groups
    from megatron.core import dist_checkpointing  # isort: skip  # after our own, which make it importable

    groups.initialize(LayoutConfig())
    try:
        tensors = _leaves(dist_checkpointing.load_plain_tensors(str(checkpoint / "shards")))
    finally:
        groups.destroy()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _leaves(node: Any, name: str = "") -> dict[str, Any]:
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in _leaves(value, f"{name}/{key}").items()}
    return {name: node} if hasattr(node, "untyped_storage") else {}
