"""What one layout computed against what another did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from llada_megatron.config.errors import RunFailed

TOLERANCES = {
    "loss": 2e-6,
    "grad_norm": 1e-5,
    "bound": 2e-6,
    "weights": 1e-5,
    "routing": 0.0,
    "expert_bias": 0.0,
}
"""Relative; `weights` is the L2 norm of the worst tensor's difference, the last two are counts and values."""


@dataclass
class Measurement:
    """What one layout computed; `weights` on the reference alone, `weight_differences` on the others."""

    losses: list[float]
    grad_norms: list[float]
    bound: float
    load: dict[str, list[list[float]]]
    """Tokens per expert of each MoE layer, after each step."""
    routing_margin: float
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    weight_differences: dict[str, float] = field(default_factory=dict)


@dataclass
class LayoutResult:
    """How far a layout is from one process, by the names of TOLERANCES."""

    name: str
    processes: int
    differences: dict[str, float]
    worst_weight: str

    @property
    def passed(self) -> bool:
        return not self.failed()

    def failed(self) -> list[str]:
        """Names of the quantities beyond their tolerance; NaN is beyond every one."""
        return [name for name, value in self.differences.items() if not value <= TOLERANCES[name]]


@dataclass
class LayoutReport:
    """The results of a matrix and the smallest routing margin of its reference."""

    results: list[LayoutResult]
    routing_margin: float

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def as_json(self) -> dict[str, Any]:
        results = [asdict(result) | {"passed": result.passed} for result in self.results]
        return {
            "layouts": results,
            "tolerances": TOLERANCES,
            "routing_margin": self.routing_margin,
            "passed": self.passed,
        }


def compare(name: str, processes: int, measured: Measurement, reference: Measurement) -> LayoutResult:
    """Differences of a layout from the reference, by the names of TOLERANCES."""
    biases = {k: v for k, v in measured.weight_differences.items() if k.endswith("expert_bias")}
    weights = {k: v for k, v in measured.weight_differences.items() if k not in biases}
    if set(measured.weight_differences) != set(reference.weights):
        raise RunFailed(f"{name} has other parameters than one process: this is an error of the layout.")
    layers = reference.load
    moved = sum(float(np.abs(np.subtract(measured.load[layer], layers[layer])).sum() / 2) for layer in layers)
    worst_weight = max(weights, key=lambda key: weights[key])
    return LayoutResult(
        name,
        processes,
        {
            "loss": _largest_relative(measured.losses, reference.losses),
            "grad_norm": _largest_relative(measured.grad_norms, reference.grad_norms),
            "bound": _largest_relative([measured.bound], [reference.bound]),
            "weights": weights[worst_weight],
            "routing": moved,
            "expert_bias": max(biases.values()),
        },
        worst_weight,
    )


def _largest_relative(ours: list[float], theirs: list[float]) -> float:
    return float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
