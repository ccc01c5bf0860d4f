"""Layouts for a run that goes on with fewer nodes (slurm.min_nodes): found when it is submitted.

A job's script runs before anything of ours can compute, so what it may need lies beside it: a whole
configuration for each number of nodes that has a layout, with the same global batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from llada_megatron.config.compose import save
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.record.run_dir import RunDir


def on_fewer_nodes(config: Config) -> dict[int, tuple[Config, str]]:
    """By number of nodes, the most first: the configuration on so many, and a line about its layout.

    Each layout is the fastest that `llada plan --search` finds there. Empty without slurm.min_nodes; raises
    BadInput where there is none, or no plan.
    """
    least, nodes = config.slurm.min_nodes, config.cluster.nodes
    if not least:
        return {}
    if least >= nodes:
        raise BadInput(f"slurm.min_nodes={least} leaves nothing to lose of cluster.nodes={nodes}: lower it.")
    found = {}
    for count in range(nodes - 1, least - 1, -1):
        fewer = replace(config, cluster=replace(config.cluster, nodes=count))
        if best := _best(fewer):
            found[count] = best
    if not found:
        raise BadInput(
            f"slurm.min_nodes={least}: on none of {least} to {nodes - 1} nodes is there a layout that fits"
            f" layout.global_batch={config.layout.global_batch}: lower it, or set it to 0 (`llada plan"
            " --search ... cluster.nodes=N` says why)."
        )
    return found


def _best(config: Config) -> tuple[Config, str] | None:
    from llada_megatron.plan.planner import Planner
    from llada_megatron.plan.search import Search, describe

    candidates = Search(Planner(config)).run().candidates
    if not candidates:
        return None
    best = candidates[0]
    described = f"{describe(best.layout)}; about {best.hours:,.1f} hours"
    return replace(config, layout=best.layout), described


def keep(run_dir: Path, config: Config, fewer: dict[int, tuple[Config, str]]) -> None:
    """Write the configuration on each number of nodes, all of them included, in the place of earlier ones."""
    files = RunDir(run_dir)
    for earlier in files.node_counts():
        files.config_on(earlier).unlink()
    if fewer:
        save(config, files.config_on(config.cluster.nodes))
    for count, (of_count, _) in fewer.items():
        save(of_count, files.config_on(count))
