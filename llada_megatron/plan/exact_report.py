"""The dry run for people: the verdict first, each pipeline stage beside the closed form, then the details."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from llada_megatron.config.layout import data_parallel_size, micro_batches_per_step
from llada_megatron.config.quantities import GB, quantity
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config
from llada_megatron.plan.exact import RankComparison
from llada_megatron.plan.families import plan_formulas_of
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.report import bars, table_of
from llada_megatron.plan.search import describe
from llada_megatron.plan.topology import gpus

LEVELS = " ▁▂▃▄▅▆▇█"
ORIGINS = 12


def with_progress(reports: Iterable[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """The reports, with a line on stderr while they come."""
    console, began, found = Console(stderr=True, highlight=False), time.monotonic(), []
    with console.status(f"importing megatron-core, then {ranks} ranks to go") as status:
        for report in reports:
            found.append(report)
            status.update(f"{len(found)} of {ranks} ranks after {time.monotonic() - began:.0f} s")
    return found


def print_count(config: Config, counted: int, expected: int, ranks: int) -> None:
    """Parameters of every place in the grid."""
    console = Console(highlight=False)
    right = counted == expected
    console.print(
        Text(
            f"{config.run.name}: {counted:,} parameters on {ranks} places of the grid,"
            f" {'as the model has' if right else f'but the model has {expected:,}'}",
            style="bold green" if right else "bold red",
        )
    )
    console.print(f"  {describe(config.layout)}, each shard counted once")


def print_exact(
    planner: Planner,
    stage: Stage,
    micro_batches: int,
    found: list[RankComparison],
    *,
    without: Sequence[str] = (),
) -> None:
    """Everything about one dry run; without: settings of the run that it left out."""
    console = Console(highlight=False)
    _verdict(console, planner, stage, found)
    _stages(console, planner, found)
    fullest = max(found, key=lambda one: one.report["peak"])
    _peak(console, fullest)
    _messages(console, fullest)
    real = micro_batches_per_step(planner.config.layout, stage)
    seconds = sum(one.report["seconds"] for one in found)
    if without:
        console.print(f"\nLeft out, since no dry run has it: {', '.join(without)}.")
    assumed = [] if stage.geometry.causal else ["half of the positions masked, no noise on embeddings"]
    assumed += [*plan_formulas_of(planner.model).assumed_of_shapes(planner.model), "experts balanced"]
    console.print(
        f"\nAssumed: {'; '.join(assumed)}; {micro_batches} of a step's {real} micro-batches, each sending"
        f" {real / micro_batches:g} times"
        f"{', in the pass before the step as well' * stage.geometry.passes_before(planner.config, real)}."
        " Attention, RMSNorm and SwiGLU keep and make what fused kernels do."
        "\nNot in it: fragmentation of the allocator, buffers of NCCL, the CUDA context, workspaces of"
        f" kernels.\nThe ranks took {seconds:.0f} s."
    )


def figures(
    planner: Planner, stage: Stage, micro_batches: int, found: list[RankComparison]
) -> dict[str, Any]:
    """What the dry run found in a stage beside the closed form, for a JSON file."""
    return {
        "stage": stage.name,
        "micro_batches": micro_batches,
        "usable_bytes": planner.usable_bytes,
        "ranks": [
            {
                **one.report,
                "closed_form": {
                    "parameters": one.parameters.trained,
                    "static": one.static,
                    "kept": one.kept,
                    "peak": one.peak,
                    "messages": _by_name(one.messages),
                },
                "messages_of_a_step": _by_name(one.messages_found),
            }
            for one in found
        ],
    }


def _by_name(messages: Counter[tuple[str, str]]) -> dict[str, int]:
    return {" ".join(name): size for name, size in sorted(messages.items())}


def _verdict(console: Console, planner: Planner, stage: Stage, found: list[RankComparison]) -> None:
    config, usable = planner.config, planner.usable_bytes
    fullest = max(found, key=lambda one: one.report["peak"])
    peak, (unit, letter) = fullest.report["peak"], _unit(found)
    word, style = ("fits", "bold green") if peak <= usable else ("does not fit", "bold red")
    devices = gpus(planner.cluster)
    where = f"{planner.cluster.name} ({devices} GPU{'s' * (devices > 1)})"
    console.print(Text(f"{config.run.name} {word} on {where}, dry run of {stage.name}", style=style))
    console.print(f"  {describe(config.layout)}, dp {data_parallel_size(config.layout)}")
    console.print(
        f"  memory  {peak / unit:.2f} {letter} on pipeline stage {fullest.rank}, of {usable / unit:.1f};"
        f" closed form {fullest.peak / unit:.2f}"
    )
    same = all(
        one.parameters_found == one.parameters.trained
        and one.kept == one.report["kept"]
        and one.messages == one.messages_found
        for one in found
    )
    verdict = "as computed, to the byte" if same else "not all as computed: see below"
    console.print(f"  parameters, kept bytes and messages {verdict}")


def _stages(console: Console, planner: Planner, found: list[RankComparison]) -> None:
    unit, letter = _unit(found)
    compared = [word for name in ("static", "kept", "sent", "peak") for word in (name, "diff.")]
    headers = ("stage", "rank", "params", *compared)
    table = table_of(f"Pipeline stages, {letter}, and by how much the closed form differs", headers)
    for one in found:
        pairs = [
            (one.static_found, sum(one.static.values())),
            (sum(one.report["kept"]), sum(one.kept)),
            (one.messages_found.total(), one.messages.total()),
            (one.report["peak"], one.peak),
        ]
        cells = [text for pair in pairs for text in (f"{pair[0] / unit:.2f}", _percent(*pair))]
        too_much = one.report["peak"] > planner.usable_bytes
        table.add_row(
            str(one.rank),
            str(one.report["rank"]),
            quantity(one.parameters_found),
            *cells,
            style="bold red" if too_much else "",
        )
    console.print(table)


def _peak(console: Console, one: RankComparison) -> None:
    unit, letter = _unit([one])
    report = one.report
    sizes = {name: report["static"][name] for name in ("weights", "gradients", "optimizer")}
    origins: Counter[str] = Counter()
    for phase, module, size in report["peak_origins"]:
        part = ".".join(module.removeprefix("decoder.").split(".")[:3])
        origins[f"{phase}: {part or 'the step'}"] += size
    sizes |= dict(origins.most_common(ORIGINS))
    rest = report["peak"] - sum(sizes.values())
    console.print(
        f"\nAlive at the peak of stage {one.rank}, by what made it, {letter} and share of"
        f" {report['peak'] / unit:.2f}"
    )
    named = {name: size / unit for name, size in {**sizes, "everything else": rest}.items()}
    bars(console, named, report["peak"] / unit, "{:.2f}", width=44)
    lowest, highest = report["static"]["weights"], report["peak"]
    line = "".join(
        LEVELS[max(0, min(8, round(8 * (size - lowest) / max(1, highest - lowest))))]
        for size in _thinned(report["over_time"], 76)
    )
    console.print(f"\nLive bytes through its step, up to {highest / unit:.2f} {letter}\n  {line}")


def _thinned(values: list[int], points: int) -> list[int]:
    part = max(1, -(-len(values) // points))
    return [max(values[at : at + part]) for at in range(0, len(values), part)]


def _messages(console: Console, one: RankComparison) -> None:
    if not one.messages_found:
        return
    unit, letter = (GB, "GB") if one.messages_found.total() >= GB else (1e6, "MB")
    headers = ("group", "operation", letter, "diff.")
    table = table_of(f"What stage {one.rank} sends in a step", headers, left=headers[:2])
    for name in sorted({*one.messages, *one.messages_found}, key=lambda name: -one.messages_found[name]):
        pair = one.messages_found[name], one.messages[name]
        table.add_row(name[0], name[1].replace("_", "-"), f"{pair[0] / unit:.3f}", _percent(*pair))
    console.print(table)


def _unit(found: list[RankComparison]) -> tuple[float, str]:
    return (GB, "GB") if max(one.report["peak"] for one in found) >= GB else (1e6, "MB")


def _percent(exact: float, closed: float) -> str:
    """By how much the closed form differs; 0 when it does not at all."""
    if exact == closed:
        return "0"
    return f"{closed / exact - 1:+.2%}" if exact else "new"
