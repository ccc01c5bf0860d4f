"""A set of golden cases on disk: its checkpoint as our model, and the tensors that are stored beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.config_json import architecture_of, model_config
from llada_megatron.convert.conversion import hf_to_mcore
from llada_megatron.convert.loaded import load_model
from llada_megatron.model.gpt import BlockDiffusionGPT
from llada_megatron.record.json_files import read_json

REMEDY = "give a directory of golden cases"


class Stored(Mapping[str, Tensor]):
    """Stored tensors under a prefix, by the rest of their names; which ones were looked at is kept."""

    def __init__(self, tensors: dict[str, Tensor], looked_at: set[str], prefix: str = "") -> None:
        self._tensors, self.looked_at, self._prefix = tensors, looked_at, prefix

    def __getitem__(self, name: str) -> Tensor:
        self.looked_at.add(self._prefix + name)
        return self._tensors[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        start = len(self._prefix)
        return (name[start:] for name in self._tensors if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return f"{self._prefix}{name}" in self._tensors

    def under(self, name: str) -> Stored:
        """Those whose names begin with `name.`."""
        return Stored(self._tensors, self.looked_at, f"{self._prefix}{name}.")

    def needed(self, name: str) -> Tensor:
        """One that a case cannot be computed without; BadInput naming it where it is not stored."""
        if name not in self:
            raise BadInput(f"cases.safetensors holds no {self._prefix}{name}: {REMEDY}.")
        return self[name]

    def like(self, name: str, ours: Tensor) -> Tensor:
        """One that is compared with `ours`; BadInput where it has another shape."""
        stored = self[name]
        if stored.shape != ours.shape:
            raise BadInput(
                f"cases.safetensors holds {self._prefix}{name} of shape {list(stored.shape)}, and the model's"
                f" is {list(ours.shape)}: store the whole of it."
            )
        return stored

    def ids(self, name: str, bound: int) -> Tensor:
        """Ids below `bound`, or positions below such a bound; BadInput where they are missing or others."""
        ids = self.needed(name)
        if ids.dtype is not torch.int64 or not ids.numel() or not 0 <= ids.min() <= ids.max() < bound:
            raise BadInput(
                f"cases.safetensors holds {self._prefix}{name} that is not int64 below {bound}: {REMEDY}."
            )
        return ids


@dataclass
class Golden:
    """A directory's model and its stored cases."""

    architecture: str
    model: ModelConfig
    stage: BlockDiffusionGPT
    stored: Stored


def load(directory: Path, mask_token_id: int) -> Golden:
    """Convert the directory's checkpoint, load the result in fp32, and read the cases."""
    try:
        stored = load_file(directory / "cases.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{directory}/cases.safetensors cannot be read ({error}): {REMEDY}.") from None
    inputs = (tensor for name, tensor in stored.items() if name.endswith("input_ids") and tensor.dim())
    longest = max((tensor.shape[-1] for tensor in inputs), default=1)
    described = read_json(directory / "config.json", REMEDY)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        hf_to_mcore(directory, checkpoint, mask_token_id=mask_token_id).require()
        model = model_config(described, mask_token_id, f"{directory}/config.json")
        stage = load_model(checkpoint, model, sequence_length=longest)
    return Golden(architecture_of(described), model, stage, Stored(stored, set()))
