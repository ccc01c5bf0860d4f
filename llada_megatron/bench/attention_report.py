"""`llada bench attention` for people: a table, files, pictures, and what changed since an earlier run."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llada_megatron.config.errors import BadInput
from llada_megatron.record.json_files import read_json, write_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from llada_megatron.bench.attention import Result

CHANGED = 0.1
"""Changes of time beyond this are marked: on a shared CPU medians of two runs differ by some percent."""

Times = dict[tuple[str, str], float | None]  # seconds by case and executor


def print_table(results: list[Result], machine: dict[str, Any]) -> None:
    """One table per case, one line per executor."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{machine['device']}, {machine['dtype']}, torch {machine['torch']}; "
        f"a matrix product reaches {machine['matmul_flops_per_sec'] / 1e9:.0f} GFLOP/s"
    )
    for case in dict.fromkeys(result.case for result in results):
        of_case = [result for result in results if result.case == case]
        console.print(f"\n{case.name}, ideal {of_case[0].ideal:.1f}x", style="bold")
        console.print(_table(of_case))
    console.print(
        "\nmedian ms and quartile spread; GFLOP/s on visible pairs; ideal: dense pairs over visible pairs;"
        "\nMiB: peak of forward and backward over the inputs"
    )
    if any(result.dense_is_extrapolated for result in results):
        console.print("* dense SDPA extrapolated by pairs from the longest case that was measured")


def _table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("executor", no_wrap=True, min_width=12)
    for name in ("forward ms", "backward ms", "GFLOP/s", "x dense", "of ideal", "MiB"):
        table.add_column(name, justify="right", no_wrap=True, min_width=8)
    for result in results:
        if result.refusal is not None:
            table.add_row(result.executor, "-", result.refusal)
        elif not result.correct:
            table.add_row(result.executor, "wrong:", f"error {result.error:.0e}")
        else:
            table.add_row(result.executor, *_figures(result))
    return table


def _figures(result: Result) -> list[str]:
    star = "*" if result.dense_is_extrapolated else ""
    speedup, rate = result.speedup, result.flops_per_sec
    return [
        _time(result.forward),
        _time(result.backward),
        f"{rate / 1e9:.0f}" if rate else "",
        f"{speedup:.2f}{star}" if speedup and rate else "",
        f"{speedup / result.ideal:.0%}{star}" if speedup and rate else "",
        f"{result.peak_bytes / 2**20:.0f}" if result.peak_bytes is not None else "",
    ]


def _time(seconds: list[float]) -> str:
    low, _, high = statistics.quantiles(seconds, n=4)
    return f"{1e3 * statistics.median(seconds):.1f} ±{1e3 * (high - low) / 2:.1f}"


def write(results: list[Result], machine: dict[str, Any], directory: Path) -> None:
    """Write attention.json, attention.csv and one PNG per kind of documents and head shape."""
    directory.mkdir(parents=True, exist_ok=True)
    records = [result.as_dict() for result in results]
    write_json(directory / "attention.json", {"machine": machine, "results": records})
    with open(directory / "attention.csv", "w", newline="", encoding="utf-8") as file:
        scalars = [name for name, value in records[0].items() if not isinstance(value, list)]
        writer = csv.DictWriter(file, scalars, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(records)
    timed = [result for result in results if result.seconds is not None]
    for documents, shape in dict.fromkeys((r.case.documents, r.case.shape) for r in timed):
        chosen = [r for r in timed if (r.case.documents, r.case.shape) == (documents, shape)]
        name = f"attention_{documents}_{shape}.png".replace(" ", "_").replace(":", "-")
        _plot(chosen, f"documents: {documents}, heads {shape}, {machine['device']}", directory / name)


def _plot(results: list[Result], title: str, path: Path) -> None:
    """One panel per block size: time over length, or bars where there is one length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from llada_megatron.observe.plots import LINES, STYLE

    def panel_of(result: Result) -> str:
        return f"block {result.case.block_size}" if result.case.clean_copy else "one block (MDLM)"

    panels = list(dict.fromkeys(map(panel_of, results)))
    styles = dict(zip(dict.fromkeys(result.executor for result in results), LINES * 2, strict=False))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(max(6, 4 * columns), 0.7 + 3.1 * rows), layout="constrained")
        for axes, panel in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False):
            _panel(axes, [result for result in results if panel_of(result) == panel], styles)
            axes.set_title(panel, loc="left", fontsize=11)
        for axes in figure.axes[len(panels) :]:
            axes.remove()
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figure.savefig(path, dpi=120)
        pyplot.close(figure)


def _panel(axes: Axes, results: list[Result], styles: dict[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import LogLocator

    lengths = sorted({result.case.length for result in results})
    if len(lengths) == 1:
        ordered = results[::-1]
        milliseconds = [1e3 * (result.seconds or 0) for result in ordered]
        colours = [styles[result.executor][0] for result in ordered]
        bars = axes.barh([result.executor for result in ordered], milliseconds, color=colours)
        labels = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in milliseconds]
        axes.bar_label(bars, labels, padding=3, fontsize=9)
        axes.margins(x=0.15)
        axes.grid(False)
        axes.set_xlabel(f"forward + backward, ms, L = {lengths[0]}")
        return
    for executor, (colour, marker) in styles.items():
        points = [(r.case.length, 1e3 * (r.seconds or 0)) for r in results if r.executor == executor]
        if points:
            axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, label=executor)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length // 1024}k" for length in lengths])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("L")
    axes.set_ylabel("forward + backward, ms")


def read_times(file: Path) -> Times:
    """Return the times of an earlier attention.json; raises BadInput or OSError where it is none."""
    content = read_json(file, "--compare takes the attention.json of an earlier run")
    try:
        return {(record["case"], record["executor"]): record["seconds"] for record in content["results"]}
    except (TypeError, KeyError):
        raise BadInput(f"--compare {file}: this is no attention.json of an earlier run") from None


def print_changes(results: list[Result], old: Times) -> None:
    """Print every time against the earlier one, and what only one of the runs has."""
    console = Console(highlight=False)
    console.print("\nforward + backward against the earlier run", style="bold")
    new = {(result.case.name, result.executor): result.seconds for result in results}
    for case in dict.fromkeys(case for case, _ in new | old):
        table = Table(case, box=None, pad_edge=False, show_edge=False)
        table.columns[0].min_width = 40
        for name in ("ms before", "ms now", "ratio", ""):
            table.add_column(name, justify="right", no_wrap=True)
        for executor in dict.fromkeys(executor for of_case, executor in new | old if of_case == case):
            table.add_row(executor, *_change(old.get((case, executor)), new.get((case, executor))))
        console.print(table)


def _change(before: float | None, now: float | None) -> list[str]:
    times = [f"{1e3 * seconds:.1f}" if seconds else "-" for seconds in (before, now)]
    if not before or not now:
        return [*times, "", ""]
    ratio = now / before
    return [*times, f"{ratio:.2f}", "" if abs(ratio - 1) <= CHANGED else "slower" if ratio > 1 else "faster"]
