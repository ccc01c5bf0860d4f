"""Calibration: achievable shares of a cluster's peaks, fitted to measured steps.

    minimise  sum over steps  (log planned/measured)^2  +  PRIOR * sum over shares  (log fitted/described)^2

Attention's share comes from the attention benchmark where there is one. What no measurement tells, such as
links after runs of one process, stays as the cluster describes it: that is what the second sum is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

from llada_megatron.config import compose, rules
from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import DocumentLengths, peak_flops
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import ClusterConfig, Config
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.report import table_of
from llada_megatron.record.json_files import read_json

FITTED = (
    "gemm_efficiency",
    "grouped_gemm_efficiency",
    "attention_efficiency",
    "memory_efficiency",
    "link_efficiency",
    "node_latency_us",
    "network_latency_us",
)
REMEDY = "give files of `llada bench step --json FILE` and `llada bench attention --out DIR`"
PRIOR = 0.01
"""A share may move by ten times the steps' scatter before the description holds it back as much."""
ROUNDS = 50
CONVERGED = 1e-6
PLANNED_OF_BENCHED_FLOPS = 12 / 14
"""The attention benchmark counts five products in backward, as kernels perform; a plan counts four."""
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Measured:
    """One kind of step, timed by `llada bench step`."""

    source: str
    config: Config
    stage: Stage
    documents: DocumentLengths
    seconds: float

    @property
    def name(self) -> str:
        """What the tables call it."""
        return f"{self.source} {self.stage.name}"

    def planned(self, cluster: ClusterConfig) -> float:
        """Seconds of this step by the plan, with the cluster's rates and the nodes that it was timed on."""
        nodes = self.config.cluster
        here = replace(cluster, nodes=nodes.nodes, gpus_per_node=nodes.gpus_per_node)
        config = replace(self.config, cluster=here)
        planner = Planner(config, expert_imbalance=1.0, documents=self.documents)
        return planner.step(config.layout, planner.place(config.layout), self.stage).total


@dataclass(frozen=True)
class Benchmarks:
    """What the given files hold."""

    steps: list[Measured]
    attention: list[float]
    """FLOP/s on visible pairs, of the fastest executor on every case."""
    attention_dtype: str = ""


def read(files: Sequence[Path]) -> Benchmarks:
    """Read files that `llada bench step --json` and `llada bench attention --out` wrote.

    Raises BadInput for anything else.
    """
    steps: list[Measured] = []
    attention: list[float] = []
    dtype = ""
    for file in files:
        content = read_json(file, REMEDY)
        try:
            if "results" in content:
                attention += fastest(content["results"])
                dtype = DTYPES[content["machine"]["dtype"]]
            else:
                steps += _steps(file.stem, content)
        except (KeyError, TypeError) as error:
            raise BadInput(f"{file} holds no benchmark ({error!r}): {REMEDY}.") from None
    return Benchmarks(steps, attention, dtype)


def _steps(source: str, content: dict[str, Any]) -> list[Measured]:
    config = compose.resolve(content["config"])
    stages = {stage.name: stage for stage in rules.schedule_of(config).stages}
    documents = DocumentLengths.parse(content["documents"])
    return [
        Measured(source, config, stages[case["name"]], documents, case["seconds"])
        for case in content["cases"]
        if case["name"] in stages
    ]


def fastest(results: list[dict[str, Any]]) -> list[float]:
    """FLOP/s of the fastest of this project's executors on every case of the attention benchmark."""
    rates: dict[str, float] = {}
    for result in results:
        if result["flops_per_sec"] and not result["is_baseline"]:
            rate = result["flops_per_sec"] * PLANNED_OF_BENCHED_FLOPS
            rates[result["case"]] = max(rate, rates.get(result["case"], 0.0))
    return list(rates.values())


def _attention_share(found: Benchmarks, cluster: ClusterConfig) -> float:
    """Geometric mean over the cases of the attention benchmark."""
    peak = peak_flops(cluster, found.attention_dtype)
    if peak == 0:
        raise BadInput(
            f"cluster={cluster.name} has no peak for attention in {found.attention_dtype}: set"
            " cluster.peak_tflops (bf16) or cluster.peak_tflops_fp32, or leave the attention file out."
        )
    return math.exp(sum(map(math.log, found.attention)) / len(found.attention)) / peak


def fit(found: Benchmarks, cluster: ClusterConfig) -> ClusterConfig:
    """The cluster with shares that fit the measurements best; raises BadInput where there are none."""
    if not found.steps:
        raise BadInput("There are no steps to fit: give a file of `llada bench step --json FILE`.")
    names = [name for name in FITTED if getattr(cluster, name) > 0]
    if found.attention:
        cluster = replace(cluster, attention_efficiency=_attention_share(found, cluster))
        names = [name for name in names if name != "attention_efficiency"]

    def described(logs: Any) -> ClusterConfig:
        return replace(cluster, **dict(zip(names, numpy.exp(logs).tolist(), strict=True)))

    def misfit(logs: Any) -> Any:
        planned = [step.planned(described(logs)) for step in found.steps]
        steps = numpy.log(planned) - numpy.log([step.seconds for step in found.steps])
        return numpy.concatenate([steps, math.sqrt(PRIOR) * (logs - start)])

    start = logs = numpy.log([getattr(cluster, name) for name in names])
    now = misfit(logs)
    for _ in range(ROUNDS):  # Gauss-Newton, halving a step that overshoots
        slopes = numpy.stack(
            [(misfit(logs + move) - now) / move.max() for move in 1e-4 * numpy.eye(len(names))], axis=1
        )
        step = -numpy.linalg.lstsq(slopes, now, rcond=None)[0]
        while (then := misfit(logs + step)) @ then > now @ now and abs(step).max() > CONVERGED:
            step /= 2
        if abs(step).max() <= CONVERGED:
            break
        logs, now = logs + step, then
    return described(logs)


def print_steps(
    fitted_to: list[Measured], held_out: list[Measured], before: ClusterConfig, after: ClusterConfig
) -> None:
    console = Console(highlight=False)
    for title, steps in (("Fitted", fitted_to), ("Held out", held_out)):
        if not steps:
            continue
        headers = ("step", "measured s", "planned", "off by", "before")
        table = table_of(f"{title}: off by {worst(steps, after):.0%} at most", headers, left=headers[:1])
        for step in steps:
            now, then = step.planned(after), step.planned(before)
            table.add_row(
                step.name,
                f"{step.seconds:.3f}",
                f"{now:.3f}",
                f"{now / step.seconds - 1:+.0%}",
                f"{then / step.seconds - 1:+.0%}",
            )
        console.print(table)


def worst(steps: list[Measured], cluster: ClusterConfig) -> float:
    """The largest deviation of a plan from a measurement, relative to the measurement."""
    return max(abs(step.planned(cluster) / step.seconds - 1) for step in steps)


def print_shares(found: Benchmarks, before: ClusterConfig, after: ClusterConfig) -> None:
    console = Console(highlight=False)
    headers = ("setting", "described", "fitted")
    table = table_of("cluster." + before.name, headers, left=headers[:1])
    for name in FITTED:
        if getattr(before, name) > 0:
            table.add_row(name, f"{getattr(before, name):.3g}", f"{getattr(after, name):.3g}")
    console.print(table)
    if found.attention:
        low, high = (rate / 1e9 for rate in (min(found.attention), max(found.attention)))
        console.print(f"Attention reached {low:,.3g} to {high:,.3g} GFLOP/s on visible pairs, by case.")
    for name in FITTED:
        if name.endswith("efficiency") and getattr(after, name) > 1:
            console.print(f"{name} is above 1: the peak that {before.name} gives is too low.")


def write_cluster(
    path: Path, found: Benchmarks, files: list[Path], before: ClusterConfig, after: ClusterConfig
) -> None:
    lines = [
        f"# Fitted by `llada plan calibrate` to {', '.join(file.name for file in files)}:",
        f"# {len(found.steps)} steps within {worst(found.steps, after):.0%}.",
        *("defaults:", f"  - {before.name}", "  - _self_", f"name: {path.stem}"),
        *(f"{name}: {getattr(after, name):.3g}" for name in FITTED if getattr(before, name) > 0),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
