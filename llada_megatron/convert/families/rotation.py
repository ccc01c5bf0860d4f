"""Rotary angles of a raw config.json for the reference forward pass of a certificate.

This reads the rotary keys a second time and shares nothing with convert/rope_json.py and model/rotary.py,
so that what one side overlooks the other one does not: the certificate then fails. What is not served was
refused before.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Rotation:
    """Cosines and sines of positions, computed one pair of channels at a time in float64."""

    def __init__(self, config: dict[str, Any], head_dim: int) -> None:
        self._config = config
        self._rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        nested = [value for value in self._rope.values() if isinstance(value, dict)]
        if nested:  # one dict per kind of layer, all of them alike
            self._rope = nested[0]
        self._type = self._rope.get("rope_type") or self._rope.get("type") or "default"
        self._base = self._anywhere("rope_theta", 10000.0)
        llada2 = "LLaDA2MoeModelLM" in config.get("architectures", ())
        share = self._anywhere("partial_rotary_factor", 0.5 if llada2 else 1.0)
        self._width = int(head_dim * share)

    def cosines_and_sines(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Each fp32 [S, 1, width / 2], YaRN's attention factor included, of int64 positions [S]."""
        speeds = torch.tensor([self._speed(pair) for pair in range(self._width // 2)], dtype=torch.float64)
        angles = positions.double()[:, None, None] * speeds
        stretch = self._stretch()
        return (stretch * angles.cos()).float(), (stretch * angles.sin()).float()

    def _anywhere(self, key: str, absent: float) -> float:
        for place in (self._rope, self._config):
            if place.get(key) is not None:
                return place[key]
        return absent

    def _speed(self, pair: int) -> float:
        """Radians per position."""
        plain = self._base ** (-2 * pair / self._width)
        if self._type == "linear":
            return plain / self._rope["factor"]
        if self._type == "llama3":
            return self._llama3(plain)
        return self._yarn(pair, plain) if self._type == "yarn" else plain

    def _llama3(self, plain: float) -> float:
        wavelength = 2 * math.pi / plain
        context = self._anywhere("original_max_position_embeddings", 0)
        low, high = self._rope["low_freq_factor"], self._rope["high_freq_factor"]
        if wavelength > context / low:
            return plain / self._rope["factor"]
        if wavelength < context / high:
            return plain
        smooth = (context / wavelength - low) / (high - low)
        return (1 - smooth) * plain / self._rope["factor"] + smooth * plain

    def _yarn(self, pair: int, plain: float) -> float:
        context = self._context()
        ends = []
        for turns, rounded in (
            (self._rope.get("beta_fast") or 32, math.floor),
            (self._rope.get("beta_slow") or 1, math.ceil),
        ):
            where = self._width * math.log(context / (2 * math.pi * turns)) / (2 * math.log(self._base))
            ends.append(rounded(where) if self._rope.get("truncate", True) else where)
        low, high = max(ends[0], 0), min(ends[1], self._width - 1)
        ramp = (pair - low) / (high - low if high != low else 0.001)
        ramp = min(max(ramp, 0.0), 1.0)
        return plain / self._factor() * ramp + plain * (1 - ramp)

    def _context(self) -> float:
        return (
            self._anywhere("original_max_position_embeddings", 0) or self._config["max_position_embeddings"]
        )

    def _factor(self) -> float:
        return self._rope.get("factor") or self._config["max_position_embeddings"] / self._context()

    def _stretch(self) -> float:
        if self._type != "yarn":
            return 1.0
        if self._rope.get("attention_factor") is not None:
            return self._rope["attention_factor"]
        growth = 0.1 * math.log(self._factor()) if self._factor() > 1 else 0.0
        over, under = self._rope.get("mscale"), self._rope.get("mscale_all_dim")
        return (over * growth + 1) / (under * growth + 1) if over and under else growth + 1


def rotated(heads_SHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first channels of every head turned, pair i being channels i and i + width / 2."""
    half = cos.shape[-1]
    first, second, rest = heads_SHD.split([half, half, heads_SHD.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
