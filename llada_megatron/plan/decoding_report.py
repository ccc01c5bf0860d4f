"""Decoding by layout for people: what is decoded, a line per layout and batch, the best, what is assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.text import Text

from llada_megatron.config.quantities import GB, quantity, so_many
from llada_megatron.plan.decoding_speed import Forward, Workload
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.report import achieved_shares, table_of
from llada_megatron.plan.topology import gpus

NOT_MODELLED = (
    "starting kernels, of which a forward of few rows is mostly made where no CUDA graph starts them; what"
    " the host does between two forwards; reading prompts, and rows of a block that was just done; adapters;"
    " what a forward holds beside weights and cache"
)


def figures(planner: Planner, workload: Workload, forwards: Sequence[Forward]) -> dict[str, Any]:
    """Everything, for a file."""
    derived = ("fits", "total_seconds", "tokens_per_sec_per_sequence", "tokens_per_sec")
    return {
        "cluster": planner.cluster.name,
        "gpus": gpus(planner.cluster),
        "ep": planner.config.layout.ep,
        "etp": planner.config.layout.etp,
        "expert_imbalance": planner.expert_imbalance,
        "workload": asdict(workload),
        "forwards": [asdict(each) | {name: getattr(each, name) for name in derived} for each in forwards],
    }


def print_decoding(planner: Planner, workload: Workload, forwards: Sequence[Forward]) -> None:
    """All of it."""
    console = Console(highlight=False)
    cluster, layout = planner.cluster, planner.config.layout
    fitting = [each for each in forwards if each.fits]
    verdict = f"{len(fitting)} of {len(forwards)} layouts and batches fit on {cluster.name}"
    console.print(
        Text(f"{planner.config.run.name} decodes: {verdict}", style="bold green" if fitting else "bold red")
    )
    branches = f"{workload.branches or 'no'} lookahead branch{'es' * (workload.branches != 1)}"
    console.print(
        f"  sequences  {workload.context:,} tokens, {so_many(workload.buffer, 'active block')} of"
        f" {workload.block_size}, {branches}"
    )
    gain = f"{workload.tokens_per_forward:g} token{'s' * (workload.tokens_per_forward != 1)}"
    console.print(f"  gain       {gain} per sequence and forward, assumed")
    if planner.model.has_experts:
        console.print(f"  experts    layout.ep={layout.ep}, layout.etp={layout.etp}")
    _table(console, forwards)
    if fitting:
        _best(console, fitting, cluster.name)
    _assumptions(console, planner)


def _table(console: Console, forwards: Sequence[Forward]) -> None:
    usable = forwards[0].usable_bytes / GB
    headers = ("tp", "bp", "batch", "rows", "ms", "flops", "mem.", "msg.", "weights", "cache", "seq.", "all")
    title = f"A forward: shares of its ms, GB on a rank (of {usable:.1f}), tokens/s"
    table = table_of(title, headers)
    for each in forwards:
        shares = each.seconds["compute"], each.seconds["memory"], each.message_seconds
        speed = (f"{each.tokens_per_sec_per_sequence:,.0f}", quantity(each.tokens_per_sec))
        table.add_row(
            *(str(each.tp), str(each.bp), str(each.batch), f"{each.rows:,}"),
            f"{1e3 * each.total_seconds:.2f}",
            *(f"{share / each.total_seconds:.0%}" for share in shares),
            *(f"{size / GB:.1f}" for size in (each.weight_bytes, each.cache_bytes)),
            *(speed if each.fits else ("-", "no room")),
            style="" if each.fits else "red",
        )
    console.print(table)


def _best(console: Console, fitting: Sequence[Forward], cluster: str) -> None:
    def named(each: Forward) -> str:
        return f"layout.tp={each.tp} layout.bp={each.bp}, batch {each.batch}"

    soonest = max(fitting, key=lambda each: each.tokens_per_sec_per_sequence)
    most = max(fitting, key=lambda each: each.tokens_per_sec)
    console.print(
        f"\n  fastest for a sequence  {named(soonest)}: {soonest.tokens_per_sec_per_sequence:,.0f} tokens/s"
        f"\n  most on {cluster:<15} {named(most)}: {quantity(most.tokens_per_sec)} tokens/s"
    )


def _assumptions(console: Console, planner: Planner) -> None:
    has_experts = planner.model.has_experts
    of_experts = (
        f" the busiest process's experts get {planner.expert_imbalance:g} times the mean where ep > 1; rows"
        " choose experts evenly and by themselves, E (1 - (1 - k/E)^rows) of them, and those alone are read;"
        if has_experts
        else ""
    )
    console.print(
        f"\nAssumed: shares of the peak as in cluster={planner.cluster.name}"
        f" ({achieved_shares(planner.cluster)}); each operation takes the longer of computing and of moving"
        f" its bytes, and nothing runs beside another;{of_experts} every replica has as much to do; every"
        " sequence is as long as the context, all its active rows are masked; keys and values are gathered"
        " before attention reads them (three passes), but for a single sequence without branches; the readout"
        " is that of rule threshold; tokens per forward are those that were given: `llada eval` and"
        " `llada bench decode` measure them."
    )
    console.print(f"Not modelled: {NOT_MODELLED}. See docs/planning.md.")
