"""What a family of Hugging Face checkpoints is: one object, in a file of its own beside this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.mapping import Entry
from llada_megatron.convert.reference_files import ReferenceFiles
from llada_megatron.convert.rope_json import LONGEST, RotaryDefaults

REQUIRED = object()


class ExpertLayout(StrEnum):
    """How a checkpoint holds experts: a matrix each (published), or stacked (what dFactory trains on)."""

    separate = "separate"
    stacked = "stacked"


def architecture_of(described: dict[str, Any]) -> str:
    """The first of `architectures` in a config.json; `none` where there is none."""
    named = described.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else "none"


class Row(NamedTuple):
    """A key of their config.json, a field of ModelConfig, and what their code takes where it is absent."""

    theirs: str
    ours: str
    absent: Any = REQUIRED
    """A value, one by architecture, or a function of the whole config.json."""

    def missing(self, described: dict[str, Any]) -> Any:
        """What is taken where the key is absent from `described`; REQUIRED: it may not be."""
        if isinstance(self.absent, Mapping):
            return self.absent.get(architecture_of(described), REQUIRED)
        return self.absent(described) if callable(self.absent) else self.absent

    def read(self, described: dict[str, Any]) -> Any:
        """The value; null says nothing where it would follow from other keys."""
        said = described.get(self.theirs)
        follows = said is None and (callable(self.absent) or self.theirs not in described)
        return self.missing(described) if follows else said


class Table(Protocol):
    """A family's entries, in the order in which tensors are written."""

    def __call__(self, model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]: ...


class DropReason(Protocol):
    """Why a source tensor is left out, by its config.json; None for one that must be used."""

    def __call__(self, name: str, model: ModelConfig, described: dict[str, Any]) -> str | None: ...


class Logits(Protocol):
    """fp32 [S, vocabulary] of int64 tokens [S] at positions [S]: causal, from their tensors by their names.

    It shares nothing with the tables, the reader of config.json and the model.
    """

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor: ...


def nothing(*_: Any) -> dict[str, Any]:
    """For families whose rows say everything."""
    return {}


def never(model: ModelConfig, architecture: str) -> bool:
    """For families whose config.json has no block size."""
    return False


def served(model: ModelConfig, architecture: str) -> None:
    """For families that can express whatever their rows can."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of architectures whose tensors have the same names."""

    architectures: Mapping[str, dict[str, Any]]
    """Names, and what config.json says beside them (model_type, auto_map): the first one is the default."""
    blocks: Mapping[str, int] = field(default_factory=dict)
    """Architectures that fill masks, and their block size where config.json has none; 0: full attention."""
    after_diffusion: str | None = None
    """The architecture of models whose last stage trained diffusion, where that is another."""
    shifted: frozenset[str] = frozenset()
    """Architectures that fill a mask from the logits at the position before it, which nothing here does."""
    builds: str = "gpt"
    """model.family of what it is converted into."""
    experts: bool
    """Whether its models have any."""
    latents: bool = False
    """Whether its models have latent attention (model.mla)."""
    always: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig that all its models have alike; one with others cannot leave as this family."""
    rows: tuple[Row, ...]
    fixed: dict[str, Any]
    """Keys that the model which is built can compute in one way only; another value is refused."""
    also_written: dict[str, Any] = field(default_factory=dict)
    """Keys of a new config.json that reading one does not ask for."""
    longest: str = LONGEST
    """Key of the longest sequence."""
    rotary: RotaryDefaults | None = None
    """How the public code reads the rotary keys (convert/rope_json.py); None: it has none."""
    counts: tuple[str, ...] = ()
    """Keys that `fields` and `drop_reason` read: whole numbers, or null for 0."""
    idle: frozenset[str] = frozenset()
    """Keys beside IDLE that the public code does not compute with."""
    left_behind: frozenset[str] = frozenset()
    """Keys that do not go into another architecture's config.json."""
    fields: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] = nothing
    """(config.json, fields by rows) -> fields of ModelConfig that no row gives; BadInput for what is not
    served."""
    keys: Callable[[ModelConfig, dict[str, Any]], dict[str, Any]] = nothing
    """(model, the config.json that is changed, empty for a new one) -> keys that no row gives."""
    says_block_size: Callable[[ModelConfig, str], bool] = never
    """(model, architecture) -> whether config.json says the size of the blocks of training."""
    require: Callable[[ModelConfig, str], None] = served
    """Raises BadInput where an architecture of the family cannot express a model."""
    table: Table
    drop_reason: DropReason
    stacked_suffix: str | None = None
    """How names of tensors end that hold all experts of a layer."""
    reference: Callable[[ReferenceFiles, dict[str, Any]], Logits]

    def differing(self, model: ModelConfig) -> list[str]:
        """Why the family cannot hold a model: its settings that every model of the family has otherwise."""
        wanted = dict(self.always)
        if self.rotary is not None and self.rotary.whole_head:
            wanted["rotary_fraction"] = 1.0
        differing = [
            f"model.{name}={getattr(model, name)}"
            for name, value in wanted.items()
            if getattr(model, name) != value
        ]
        if model.mla.is_used != self.latents:
            differing.append(f"model.mla.kv_lora_rank={model.mla.kv_lora_rank}")
        return differing

    def layout_of(self, names: Iterable[str]) -> ExpertLayout:
        """How a checkpoint with tensors of these names holds experts."""
        stacked = self.stacked_suffix is not None and any(
            name.endswith(self.stacked_suffix) for name in names
        )
        return ExpertLayout.stacked if stacked else ExpertLayout.separate
