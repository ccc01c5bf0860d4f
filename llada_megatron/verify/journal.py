"""What a run trained on, written down while it trains: sample indices, and what was made of each sample."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import Config

if TYPE_CHECKING:
    from llada_megatron.objectives.batch import MicroBatch
    from llada_megatron.parallel.dealing import Deal


def train_and_record(config: Config, folder: Path, *, deal: Deal | None = None) -> int:
    """Train this rank's part of a run, with a file of its own; returns the signal that stopped it.

    `deal`: another dealing of samples than training's, which a certificate must notice.
    """
    from llada_megatron.parallel.dealing import sample_indices
    from llada_megatron.training import loop

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{os.environ['RANK']}_{os.getpid()}.jsonl").open("w") as file:

        def record(indices: list[int], batch: MicroBatch) -> None:
            for place, index in enumerate(indices):
                file.write(json.dumps({"sample": index, "batch_sha256": batch.digest(place)}) + "\n")
            file.flush()

        return loop.run(config, on_batch=record, deal=deal or sample_indices).signal


class Journal:
    """The union of what every process of a run's attempts wrote; a sample trained again must be the same."""

    def __init__(self, folder: Path) -> None:
        self.batches: dict[int, str] = {}
        for file in sorted(folder.glob("*.jsonl")):
            for line in file.read_text().splitlines():
                self._add(line)

    def _add(self, line: str) -> None:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # torn by a kill
            return
        known = self.batches.setdefault(entry["sample"], entry["batch_sha256"])
        if known != entry["batch_sha256"]:
            raise RunFailed(f"Sample {entry['sample']} came in two ways.")

    def samples_sha256(self) -> str:
        """Of the indices of all samples, in order."""
        return _digest(sorted(self.batches))

    def batches_sha256(self) -> str:
        """Of what the objective made of all samples, masks and weights among it, in sample order."""
        return _digest([[index, self.batches[index]] for index in sorted(self.batches)])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def state_sha256(checkpoint: Path) -> str:
    """Of every tensor of a checkpoint by name: weights, moments, masters and expert biases. One process."""
    import torch

    from llada_megatron.checkpoint.shards import tensors_of

    digest = hashlib.sha256()
    for name, values in tensors_of(checkpoint):
        digest.update(name.encode())
        digest.update(values.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
