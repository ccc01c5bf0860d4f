"""The rotary settings of a config.json, in every spelling, and back.

`rope_scaling` (transformers 4) and `rope_parameters` (5) hold one dict, or one per kind of layer;
`rope_theta` and `partial_rotary_factor` stand in it or beside it. Two values for one thing are refused, and
unknown keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig, RotaryScaling, RotaryScalingConfig

DICTS = ("rope_parameters", "rope_scaling")
BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
"""Keys that may stand in the dict or beside it."""
KEYS = frozenset({*DICTS, *BESIDE})
LARGEST = 1e30
"""Of a number, below what overflows."""
LONGEST = "max_position_embeddings"
SERVED = {
    "default": RotaryScaling.none,
    "linear": RotaryScaling.linear,
    "yarn": RotaryScaling.yarn,
    "llama3": RotaryScaling.llama3,
}
READ = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "yarn": frozenset(
        {"factor", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim"}
    ),
}
"""What the public code reads of the dict by rope_type, beside BESIDE."""
NEVER_READ = frozenset({"finetuned", "max_position_embeddings"}).union(*READ.values())
"""Keys that mean nothing under a rope_type that does not read them; any other may change the computation."""


class RotaryDefaults(NamedTuple):
    """What the public code of an architecture takes where config.json says nothing; others have to say."""

    base: Mapping[str, float]
    fraction: Mapping[str, float]
    whole_head: bool = False
    """Whether it can rotate whole heads alone; `partial_rotary_factor` is not written then."""
    scales_softmax: bool = False
    """Whether yarn's mscale_all_dim multiplies softmax's scale too (DeepSeek)."""


class Rotary(NamedTuple):
    """The fields of ModelConfig that config.json says with these keys."""

    rotary_base: float
    rotary_fraction: float
    rotary_scaling: RotaryScalingConfig


@dataclass(frozen=True)
class _Dict:
    """One dict of settings with what stands beside it."""

    where: str
    name: str
    inside: dict[str, Any]
    beside: dict[str, Any]

    def number(self, key: str) -> float | None:
        """A finite number, None where there is none; of BESIDE in either place."""
        values = {self.name: self.inside.get(key)}
        if key in BESIDE:
            values["config.json"] = self.beside.get(key)
        for place, value in values.items():
            if value is not None and not is_number(value):
                raise BadInput(f"{self.where} sets {key}={value!r} in {place}: it must be a number.")
        said = {float(value) for value in values.values() if value is not None}
        if len(said) > 1:
            raise BadInput(
                f"{self.where} sets {key}={values['config.json']} and, in {self.name},"
                f" {values[self.name]}: keep one."
            )
        return said.pop() if said else None

    def require(self, key: str) -> float:
        value = self.number(key)
        if value is None:
            raise BadInput(
                f"{self.where} sets rope_type={self.rope_type} in {self.name} and no '{key}', which it needs."
            )
        return value

    def positions(self, key: str) -> int:
        """`require` of a whole number."""
        return _whole(self.require(key), key, self.where)

    @property
    def rope_type(self) -> str:
        """A key of SERVED; BadInput for any other."""
        said = [self.inside[key] for key in ("rope_type", "type") if self.inside.get(key) is not None]
        if len(said) > 1 and said[0] != said[1]:
            raise BadInput(
                f"{self.where} sets two types in {self.name}, {said[0]!r} and {said[1]!r}: keep one."
            )
        if not said and any(self.inside.get(key) is not None for key in NEVER_READ):
            raise BadInput(f"{self.where} has numbers of a rotary scaling in {self.name} and no rope_type.")
        rope_type = said[0] if said else "default"
        if not isinstance(rope_type, str) or rope_type not in SERVED:
            raise BadInput(
                f"{self.where} sets rope_type={rope_type} in {self.name}: {', '.join(SERVED)} are served."
            )
        return rope_type

    def unread(self) -> list[str]:
        """Keys that the rope_type does not read; BadInput for one that may mean another computation."""
        known = {"rope_type", "type", *BESIDE, *READ[self.rope_type]}
        names = [key for key, value in self.inside.items() if key not in known and value is not None]
        if strange := [key for key in names if key not in NEVER_READ]:
            raise BadInput(
                f"{self.where} sets {', '.join(strange)} in {self.name}, which is unknown and may change what"
                " the model computes: remove it if it does not."
            )
        return [f"{self.name}.{key}" for key in names]


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; a truth value is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def read(described: dict[str, Any], defaults: RotaryDefaults, architecture: str, where: str) -> Rotary:
    """The rotary settings of a config.json; BadInput for what is not served, not known or said twice."""
    readings = [_settings(one, defaults, architecture) for one in _dicts(described, where)]
    if any(reading != readings[0] for reading in readings):
        given = ", ".join(key for key in DICTS if described.get(key))
        raise BadInput(f"{where} gives several rotary settings in {given}: one for all layers is served.")
    return readings[0]


def unread(described: dict[str, Any], where: str) -> list[str]:
    """Names of the keys that mean nothing under their rope_type."""
    return list(dict.fromkeys(name for one in _dicts(described, where) for name in one.unread()))


def write(model: ModelConfig, defaults: RotaryDefaults) -> dict[str, Any]:
    """`rope_theta`, `partial_rotary_factor` and `rope_scaling`, as all versions of the public code read."""
    scaling = model.rotary_scaling
    names: dict[str, Any] = {"rope_theta": model.rotary_base}
    if not defaults.whole_head:
        names["partial_rotary_factor"] = model.rotary_fraction
    if scaling.type is RotaryScaling.none:
        return names | {"rope_scaling": None}
    written: dict[str, Any] = {"rope_type": scaling.type.value, "factor": float(scaling.factor)}
    if scaling.type is RotaryScaling.llama3:
        written |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.type is RotaryScaling.yarn:
        written |= {name: getattr(scaling, name) for name in ("beta_fast", "beta_slow")}
        written |= {} if scaling.truncate else {"truncate": False}
        written |= _factors(scaling)
    if scaling.type is not RotaryScaling.linear:
        written["original_max_position_embeddings"] = scaling.original_positions
    return names | {"rope_scaling": written}


def _factors(scaling: RotaryScalingConfig) -> dict[str, float]:
    """Of yarn's cosines and sines; of softmax too where mscale_all_dim is not 0."""
    factor, scale = scaling.attention_factor, scaling.mscale_all_dim
    if not scale:
        return {"attention_factor": factor} if factor else {}
    if factor != 1:
        raise BadInput(
            f"model.rotary_scaling.attention_factor={factor} beside mscale_all_dim={scale} has no place in"
            " config.json, whose factor is 1 there: set attention_factor to 1."
        )
    return {"mscale": scale, "mscale_all_dim": scale}


def longest(scaling: RotaryScalingConfig) -> int | None:
    """`max_position_embeddings` of a scaling that says how far it reaches.

    Some versions of the public code take max_position_embeddings / original_max_position_embeddings for the
    factor of yarn, whatever `factor` says, so that it has to agree.
    """
    reaches = scaling.type in (RotaryScaling.yarn, RotaryScaling.llama3)
    return round(scaling.factor * scaling.original_positions) if reaches else None


def by_layer(described: dict[str, Any]) -> str | None:
    """`rope_parameters.full_attention` or the like, settings of one kind of layer; None where all share."""
    for name in DICTS:
        given = described.get(name)
        for key, value in given.items() if isinstance(given, dict) else ():
            if isinstance(value, dict):
                return f"{name}.{key}"
    return None


def _dicts(described: dict[str, Any], where: str) -> Iterator[_Dict]:
    """Every dict of rotary settings; one empty one where there is none."""
    beside = {key: described.get(key) for key in (*BESIDE, LONGEST)}
    found = 0
    for name in DICTS:
        given = described.get(name)
        if given is None or given == {}:
            continue
        if not isinstance(given, dict):
            raise BadInput(f"{where} sets {name}={given!r}: it must be an object, or null.")
        layers = [key for key, value in given.items() if isinstance(value, dict)]
        if layers and len(layers) < len(given):
            raise BadInput(f"{where} mixes settings and kinds of layers ({', '.join(layers)}) in {name}.")
        kinds = {f"{name}.{key}": given[key] for key in layers} if layers else {name: given}
        for place, inside in kinds.items():
            yield _Dict(where, place, inside, beside)
        found += len(kinds)
    if not found:
        yield _Dict(where, DICTS[0], {}, beside)


def _settings(one: _Dict, defaults: RotaryDefaults, architecture: str) -> Rotary:
    one.unread()
    base, fraction = one.number("rope_theta"), one.number("partial_rotary_factor")
    base = defaults.base.get(architecture) if base is None else base
    fraction = defaults.fraction.get(architecture) if fraction is None else fraction
    if base is None or fraction is None:
        raise BadInput(f"{one.where} has no '{'rope_theta' if base is None else 'partial_rotary_factor'}'.")
    for key, value in (("rope_theta", base), ("partial_rotary_factor", fraction)):
        if value <= 0:
            raise BadInput(f"{one.where} sets {key}={value}: it must be above 0.")
    if defaults.whole_head and fraction != 1:
        raise BadInput(
            f"{one.where} sets partial_rotary_factor={fraction}: the public code of {architecture} rotates"
            " whole heads."
        )
    scaling = _scaling(one)
    if defaults.scales_softmax and scaling.type is RotaryScaling.yarn:
        scaling.mscale_all_dim = one.number("mscale_all_dim") or 0.0
    return Rotary(base, fraction, scaling)


def _scaling(one: _Dict) -> RotaryScalingConfig:
    kind = SERVED[one.rope_type]
    if kind is RotaryScaling.none:
        return RotaryScalingConfig()
    if kind is RotaryScaling.linear:
        return RotaryScalingConfig(kind, one.require("factor"))
    if kind is RotaryScaling.llama3:
        return RotaryScalingConfig(
            kind,
            one.require("factor"),
            one.positions("original_max_position_embeddings"),
            low_freq_factor=one.require("low_freq_factor"),
            high_freq_factor=one.require("high_freq_factor"),
        )
    return _yarn(one)


def _yarn(one: _Dict) -> RotaryScalingConfig:
    original = one.number("original_max_position_embeddings")
    reach = one.beside[LONGEST]
    if reach is not None and not is_number(reach):
        raise BadInput(f"{one.where} sets {LONGEST}={reach!r}: it must be a number.")
    factor = one.number("factor")
    if factor is None and original and reach:
        factor = reach / original  # as the public code does
    if factor is None:
        factor = one.require("factor")
    if original is None:
        original = reach if reach is not None else one.require("original_max_position_embeddings")
    truncate = one.inside.get("truncate", True)
    if not isinstance(truncate, bool):
        raise BadInput(f"{one.where} sets truncate={truncate!r} in {one.name}: it must be true or false.")
    return RotaryScalingConfig(
        RotaryScaling.yarn,
        factor,
        _whole(original, "original_max_position_embeddings", one.where),
        beta_fast=one.number("beta_fast") or 32.0,
        beta_slow=one.number("beta_slow") or 1.0,
        truncate=truncate,
        attention_factor=_attention_factor(one, factor),
    )


def _attention_factor(one: _Dict, factor: float) -> float:
    """What is said, or follows from mscale and mscale_all_dim; 0 where neither is."""
    said = one.number("attention_factor")
    if said is not None and said <= 0:
        raise BadInput(f"{one.where} sets attention_factor={said} in {one.name}: it must be above 0.")
    scales = one.number("mscale"), one.number("mscale_all_dim")
    if said is None and all(scales):
        above, below = (0.1 * (scale or 0.0) * math.log(max(factor, 1.0)) + 1 for scale in scales)
        said = above / below
    return said or 0.0


def _whole(number: float, key: str, where: str) -> int:
    if number != int(number):
        raise BadInput(f"{where} sets {key}={number}: it must be a whole number.")
    return int(number)
