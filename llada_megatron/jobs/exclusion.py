"""A job's next start without the nodes that its preflight named, or that it lost, perhaps on fewer.

Settings: slurm.exclude_failed_nodes, slurm.min_nodes.

Standard library only, as attempts.py, which calls it in the batch script.
"""

from __future__ import annotations

from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.jobs import slurm
from llada_megatron.record import events
from llada_megatron.record.json_files import read_json
from llada_megatron.record.run_dir import RunDir

MAX_NODES = 4
"""What more nodes have at once, or all of several, is not the nodes' fault: a full disk, a missing mount."""


def failed_nodes(blamed: list[str], of_job: list[str]) -> list[str]:
    """Those nodes of a job that a preflight blamed; empty when it is not their fault alone."""
    named = [node for node in dict.fromkeys(blamed) if node in of_job]
    shared = len(named) > MAX_NODES or (len(named) == len(of_job) and len(of_job) > 1)
    return [] if shared else named


def go_on_without(
    run_dir: Path, job: str, nodes: list[str], *, had: int, tasks_per_node: int, requeue: bool = False
) -> None:
    """Let the job of this batch script wait for others than these nodes, if it can start then; records which.

    It gets as many nodes as it `had`, or the most below that for which it has a layout and there are nodes.
    Slurm changes the nodes of waiting jobs alone, so this goes on for a moment after Slurm asked the script
    to end, which ignores that; the job cannot start again before it has. requeue: by us, unless Slurm has.
    """
    problem, excluded, count = "", "", had
    files = RunDir(run_dir)
    try:
        excluded = ",".join(filter(None, [slurm.excluded_nodes(job), *nodes]))
        count = _most(
            files.job_script, excluded, [had, *(each for each in files.node_counts() if each < had)]
        )
    except BadInput as error:
        problem = f"the job could not start otherwise ({error})"
    if requeue and not slurm.is_ending(job):
        slurm.requeue(job)
    if not problem:
        try:
            slurm.exclude_nodes(job, excluded)
            if count < had:
                slurm.use_nodes(job, count, count * tasks_per_node)
        except BadInput as error:
            problem = str(error)
    goes_on = {} if count == had or problem else {"goes_on_with": count, "layout": _layout(files, count)}
    events.append(run_dir, "excluded", nodes=nodes, problem=problem, **goes_on)


def _most(script: Path, excluded: str, counts: list[int]) -> int:
    """The first of these numbers of nodes on which a job could start; on none: BadInput, of the first."""
    refusals = []
    for count in counts:
        try:
            slurm.check_start(script, excluded, count)
        except BadInput as refusal:
            refusals.append(refusal)
        else:
            return count
    raise refusals[0]


def _layout(files: RunDir, nodes: int) -> str:
    described = read_json(files.submission_json, "submit the run again")
    return str(described.get("fewer_nodes", {}).get(str(nodes), ""))
