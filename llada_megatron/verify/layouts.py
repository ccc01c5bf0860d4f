"""Every layout against one process: the same losses, gradients, routing and final weights, in fp32.

A short run of experiment=parity (packed documents off the block grid, an autoregressive stage, BDLM at block
4 and 32, MDLM, embedding noise) is trained under each layout in real processes and compared.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.runtime.launch import launch

MATRIX: dict[str, dict[str, Any]] = {
    "DP2": dict(processes=2),
    "DP4": dict(processes=4),
    "TP2": dict(processes=2, tp=2),
    "PP2": dict(processes=2, pp=2),
    "PP2 uneven": dict(processes=2, pp=2, pipeline=[3, 1]),
    "PP2 VPP2": dict(processes=2, pp=2, vpp=2),
    "PP4": dict(processes=4, pp=4),
    "CP2": dict(processes=2, cp=2),
    "CP4": dict(processes=4, cp=4),
    "EP2": dict(processes=2, ep=2),
    "EP2 all-gather": dict(processes=2, ep=2, dispatcher="allgather"),
    "EP4": dict(processes=4, ep=4),
    "TP2 EP2": dict(processes=2, tp=2, ep=2),
    "TP2 ETP2": dict(processes=2, tp=2, etp=2),
    "TP2 EP2 ETP2": dict(processes=4, tp=2, ep=2, etp=2),
    "TP2 PP2": dict(processes=4, tp=2, pp=2),
    "CP2 EP2": dict(processes=2, cp=2, ep=2),
    "CP2 PP2": dict(processes=4, cp=2, pp=2),
    "CP2 TP2": dict(processes=4, cp=2, tp=2),
    "TP2 CP2 EP4": dict(processes=4, tp=2, cp=2, ep=4),
    "EP2 PP2 overlap": dict(processes=4, ep=2, pp=2, overlap_grad_reduce=True, overlap_param_gather=True),
    "PP2 VPP2 EP2 overlap": dict(
        processes=4, ep=2, pp=2, vpp=2, overlap_grad_reduce=True, overlap_param_gather=True
    ),
    "selective recompute": dict(processes=1, recompute="selective"),
    "full recompute CP2": dict(processes=2, cp=2, recompute="full"),
}
"""Layouts that `llada verify layouts` compares with one process; all use the distributed optimizer."""

TOLERANCES = {
    "loss": 2e-6,
    "grad_norm": 1e-5,
    "bound": 2e-6,
    "weights": 1e-5,
    "routing": 0.0,
    "expert_bias": 0.0,
}
"""Relative; `weights` is the L2 norm of the worst tensor's difference, the last two are counts and values."""

STAGES = [
    "{name: ar, objective: autoregressive, block_size: '1', tokens: 1024}",
    "{name: bdlm_4, block_size: '4', tokens: 2048}",
    "{name: bdlm_32, block_size: '32', tokens: 2048}",
    "{name: mdlm, block_size: full, tokens: 1024}",
]


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

    def as_json(self) -> str:
        results = [asdict(result) | {"passed": result.passed} for result in self.results]
        report = {
            "layouts": results,
            "tolerances": TOLERANCES,
            "routing_margin": self.routing_margin,
            "passed": self.passed,
        }
        return json.dumps(report, indent=2) + "\n"


def check(names: list[str]) -> LayoutReport:
    """Compare the named layouts of MATRIX with one process; ValueError for a name that is not there."""
    if unknown := [name for name in names if name not in MATRIX]:
        raise ValueError(f"These are no layouts of the matrix: {unknown}. Choose from {', '.join(MATRIX)}.")
    with tempfile.TemporaryDirectory() as folder:
        corpus = write_corpus(Path(folder))
        [reference] = measure_in_processes([parity_config(corpus)], None)
        results = {}
        for processes in sorted({MATRIX[name]["processes"] for name in names}):
            chosen = [name for name in names if MATRIX[name]["processes"] == processes]
            configs = [parity_config(corpus, **MATRIX[name]) for name in chosen]
            for name, measured in zip(chosen, measure_in_processes(configs, reference), strict=True):
                results[name] = compare(name, processes, measured, reference)
    return LayoutReport([results[name] for name in names], reference.routing_margin)


def write_corpus(folder: Path) -> str:
    """Prepare the paragraphs of Python's own reference topics, as documents; returns the corpus's prefix."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")][:1500]
    lines = [json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs if paragraph]
    (folder / "paragraphs.jsonl").write_text("".join(lines), encoding="utf-8")
    prepare_corpus([folder / "paragraphs.jsonl"], folder / "paragraphs", workers=1)
    return str(folder / "paragraphs")


def parity_config(corpus: str, *overrides: str, **layout: Any) -> Config:
    """experiment=parity, shortened, on a corpus under a layout, with further hydra overrides."""
    return compose(
        [
            "experiment=parity",
            f"data.path=[{corpus}]",
            "data.split='8,2'",
            f"schedule.stages=[{', '.join(STAGES)}]",
            "evaluation.block_sizes=['32']",
            "evaluation.sequences=4",
            "evaluation.draws=1",
            *[f"layout.{name}={value}" for name, value in layout.items()],
            *overrides,
        ]
    )


def measure_in_processes(configs: list[Config], reference: Measurement | None) -> list[Measurement]:
    """Measure configurations of one number of processes, one after another in the same ranks."""
    processes = configs[0].layout.processes
    results: list[list[Measurement]] = launch(
        _measure_all, configs, reference, processes=processes, preload="llada_megatron.verify.measure"
    )
    return results[0]


def _measure_all(configs: list[Config], reference: Measurement | None) -> list[Measurement]:
    from llada_megatron.verify.measure import measure

    return [measure(config, reference) for config in configs]


def compare(name: str, processes: int, measured: Measurement, reference: Measurement) -> LayoutResult:
    """Differences of a layout from the reference, by the names of TOLERANCES."""
    biases = {k: v for k, v in measured.weight_differences.items() if k.endswith("expert_bias")}
    weights = {k: v for k, v in measured.weight_differences.items() if k not in biases}
    if set(measured.weight_differences) != set(reference.weights):
        raise ValueError(f"{name} has other parameters than one process: this is an error of the layout.")
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
