"""A set of golden cases on disk: its checkpoint as our model, and the tensors that are stored beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llada_megatron.config.choices import Core
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.config_json import architecture_of, model_config
from llada_megatron.convert.conversion import hf_to_mcore
from llada_megatron.convert.loaded import load_model
from llada_megatron.convert.safetensors_files import SafetensorsReader
from llada_megatron.convert.weight_files import SINGLE
from llada_megatron.model.gpt import BlockDiffusionStage
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
        """One that is compared with `ours`; BadInput where it is missing or has another shape."""
        stored = self.needed(name)
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
    """A checkpoint as our model, and stored cases of it."""

    directory: Path
    architecture: str
    model: ModelConfig
    stage: BlockDiffusionStage
    stored: Stored
    longest: int
    """Tokens of the longest sequence."""
    _altered: dict[str, BlockDiffusionStage] = field(default_factory=dict)

    def altered(self, prefix: str) -> Golden:
        """The model with the stored tensors under `prefix` in the place of the checkpoint's own."""
        if prefix not in self._altered:
            files, others = SafetensorsReader(self.directory), self.stored.under(prefix)
            if unknown := [name for name in others if name not in files.tensors]:
                raise BadInput(f"{self.directory} has no {unknown[0]} to put {prefix}'s in place: {REMEDY}.")
            tensors = {name: files.tensor(name) for name in files.tensors}
            with tempfile.TemporaryDirectory() as folder:
                save_file(tensors | dict(others), Path(folder) / SINGLE)
                (Path(folder) / "config.json").write_bytes((self.directory / "config.json").read_bytes())
                self._altered[prefix] = _loaded(Path(folder), self.model, self.longest)
        return replace(self, stage=self._altered[prefix])


def load(directory: Path, checkpoint: Path, mask_token_id: int, core: Core = Core.gpt) -> Golden:
    """Read the cases of a directory; convert the checkpoint that they are of, and load the result in fp32."""
    try:
        stored = load_file(directory / "cases.safetensors")
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{directory}/cases.safetensors cannot be read ({error}): {REMEDY}.") from None
    longest = max(
        (tensor.shape[-1] for tensor in stored.values() if tensor.dim() and tensor.dtype is torch.int64),
        default=1,
    )
    described = read_json(checkpoint / "config.json", REMEDY)
    model = replace(model_config(described, mask_token_id, f"{checkpoint}/config.json"), core=core)
    stage = _loaded(checkpoint, model, longest)
    return Golden(checkpoint, architecture_of(described), model, stage, Stored(stored, set()), longest)


def _loaded(checkpoint: Path, model: ModelConfig, longest: int) -> BlockDiffusionStage:
    with tempfile.TemporaryDirectory() as folder:
        ours = Path(folder) / "checkpoint"
        hf_to_mcore(checkpoint, ours, mask_token_id=model.mask_token_id).require()
        return load_model(ours, model, sequence_length=longest)
