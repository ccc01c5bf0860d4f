"""Every layout against one process: the same losses, gradients, routing and final weights, in fp32.

A short run of experiment=parity (packed documents off the block grid, an autoregressive stage, BDLM at block
4 and 32, MDLM, embedding noise) is trained under each layout in real processes and compared.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.runtime.launch import launch
from llada_megatron.verify.comparison import LayoutReport, Measurement, compare

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

STAGES = [
    "{name: ar, objective: autoregressive, block_size: '1', tokens: 1024}",
    "{name: bdlm_4, block_size: '4', tokens: 2048}",
    "{name: bdlm_32, block_size: '32', tokens: 2048}",
    "{name: mdlm, block_size: full, tokens: 1024}",
]


def check(names: list[str]) -> LayoutReport:
    """Compare the named layouts of MATRIX with one process; BadInput for a name that is not there."""
    if unknown := [name for name in names if name not in MATRIX]:
        raise BadInput(f"These are no layouts of the matrix: {unknown}. Choose from {', '.join(MATRIX)}.")
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
