"""A coordinate check of decoupled muP: how far a few steps move activations, over the width of a model.

Every width is trained on the same random tokens from the first weights of experiment=dlcm_parity without
experts. With muP a step moves an activation as far at every width, without it farther the wider a model is
(Yang et al., arXiv 2203.03466, appendix D.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from megatron.core.utils import unwrap_model

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample
from llada_megatron.model.readout import LOGITS
from llada_megatron.objectives.passes import evaluating
from llada_megatron.observe.plots import LINES, STYLE
from llada_megatron.parallel import groups
from llada_megatron.record.json_files import write_json
from llada_megatron.training.step import assemble, train_step

BASE, WIDTHS = 64, (64, 128, 256, 512)
PARTS = ("encoder", "backbone", "decoder", "logits")
STEPS, SEQUENCES, TOKENS = 5, 4, 64
DENSE = [
    *("experiment=dlcm_parity", "model.dense_layers=4", "model.experts=0", "model.expert_groups=1"),
    *("model.experts_per_token=0", "model.expert_groups_per_token=1", "model.shared_expert_hidden_size=0"),
    *("model.expert_bias=false", "model.concepts.hidden_size=64", "model.concepts.heads=2"),
    *("model.concepts.kv_heads=2", "model.heads=2", "model.concepts.ffn_hidden_size=128"),
    *(
        f"data.sequence_length={TOKENS}",
        f"layout.global_batch={SEQUENCES}",
        f"layout.micro_batch={SEQUENCES}",
    ),
    *("optimizer.warmup_tokens=0", "optimizer.lr=0.005", "optimizer.eps=1e-8", "optimizer.weight_decay=0"),
    f"schedule.stages=[{{name: mup, objective: concepts, block_size: '1',"
    f" tokens: {STEPS * SEQUENCES * TOKENS}}}]",
]


def configuration(width: int, *, mup: bool, overrides: Sequence[str] = ()) -> Config:
    """The model of BASE with every width multiplied; head_dim and vocabulary stay."""
    config = compose([*DENSE, *overrides])
    model, times = config.model, width // BASE
    concepts = replace(
        model.concepts,
        mup_base_hidden_size=BASE if mup else 0,
        **{
            name: getattr(model.concepts, name) * times
            for name in ("hidden_size", "heads", "kv_heads", "ffn_hidden_size")
        },
    )
    widths = {name: getattr(model, name) * times for name in ("hidden_size", "heads", "kv_heads")}
    widths["ffn_hidden_size"] = model.ffn_hidden_size * times
    return replace(config, model=replace(model, concepts=concepts, **widths))


def moved(config: Config) -> dict[str, float]:
    """Root mean square of the change of each part's activations over the steps; of a process's own groups."""
    schedule = rules.check(config)
    words = np.random.Generator(np.random.Philox(0)).integers(0, 256, (SEQUENCES, TOKENS))
    edges = np.array([0, TOKENS])
    samples: Any = {
        index: PackedSample(words[index % SEQUENCES], edges) for index in range(STEPS * SEQUENCES)
    }
    trainer = assemble(config, schedule, lambda step: samples)
    before = _activations(trainer, samples)
    for step in range(schedule.total_steps):
        train_step(trainer, step)
    after = _activations(trainer, samples)
    return {part: float((after[part] - before[part]).square().mean().sqrt()) for part in PARTS}


def _activations(trainer: Any, samples: Any) -> dict[str, torch.Tensor]:
    """What the last layer of each block adds up to, and the logits."""
    [model], found = unwrap_model(list(trainer.model)), {}
    stage = trainer.schedule.stages[0]
    batch = trainer.objectives[stage.objective].batch(samples, list(range(SEQUENCES)), stage)
    batch.inputs.readout = LOGITS
    hooks = [
        getattr(model, part)
        .layers[-1]
        .register_forward_hook(lambda layer, given, output, part=part: found.update({part: output[0]}))
        for part in PARTS[:-1]
    ]
    with evaluating(trainer.model):
        batch.inputs.draws = torch.where(torch.arange(TOKENS) % 4 == 0, 0.0, 1.0).expand(SEQUENCES, -1)
        found["logits"] = model(batch.inputs)
    for hook in hooks:
        hook.remove()
    return {part: activations.detach().double() for part, activations in found.items()}


def measure(
    widths: Sequence[int] = WIDTHS, overrides: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """By `muP` and `none`, and by part, the change at each width."""
    found: dict[str, dict[str, list[float]]] = {}
    for name in ("muP", "none"):
        configs = [configuration(width, mup=name == "muP", overrides=overrides) for width in widths]
        groups.initialize(configs[0].layout, threads=configs[0].training.threads)
        try:
            each = [moved(config) for config in configs]
        finally:
            groups.destroy()
        found[name] = {part: [one[part] for one in each] for part in PARTS}
    return found


def run(overrides: Sequence[str], out: Path | None) -> dict[str, Any]:
    """Measure, print, and write OUT/mup.json with a picture; one process."""
    found = measure(overrides=overrides)
    print(f"{'change after ' + str(STEPS) + ' steps':<24}" + "".join(f"{width:>10}" for width in WIDTHS))
    for name, parts in found.items():
        for part, values in parts.items():
            print(f"{name + ', ' + part:<24}" + "".join(f"{value:>10.3g}" for value in values))
    record = {"widths": list(WIDTHS), "base": BASE, "steps": STEPS, "change": found}
    if out is not None:
        write_json(out / "mup.json", record)
        plot(found, out / "mup.png")
        print(f"{out}/mup.json, {out}/mup.png")
    return record


def plot(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the changes over the width, with muP and without."""
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.6), layout="constrained")
        for axes, (name, parts) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
            for (part, values), (colour, marker) in zip(parts.items(), LINES, strict=False):
                axes.loglog(WIDTHS, values, color=colour, marker=marker, label=part)
            axes.set_title("decoupled muP" if name == "muP" else "without muP", fontsize=11)
            axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS], minor=False)
            axes.minorticks_off()
            axes.set_xlabel("width")
        figure.axes[0].set_ylabel(f"RMS change in {STEPS} steps")
        figure.axes[0].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
