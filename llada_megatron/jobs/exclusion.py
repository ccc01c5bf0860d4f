"""A job's next start without the nodes that its preflight named (slurm.exclude_failed_nodes).

Standard library only, as attempts.py, which calls it in the batch script.
"""

from __future__ import annotations

import signal
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.jobs import slurm
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir

MAX_NODES = 4
"""What more nodes have at once, or all of several, is not the nodes' fault: a full disk, a missing mount."""


def failed_nodes(blamed: list[str], of_job: list[str]) -> list[str]:
    """Those nodes of a job that a preflight blamed; empty when it is not their fault alone."""
    named = [node for node in dict.fromkeys(blamed) if node in of_job]
    shared = len(named) > MAX_NODES or (len(named) == len(of_job) and len(of_job) > 1)
    return [] if shared else named


def requeue_without(run_dir: Path, job: str, nodes: list[str]) -> None:
    """Requeue the job of this batch script, without these nodes if it can start then; records which.

    Slurm changes the nodes of waiting jobs alone, so this goes on for a moment after Slurm asked the script
    to end; the job cannot start again before it has.
    """
    problem = ""
    try:
        excluded = ",".join(filter(None, [slurm.excluded_nodes(job), *nodes]))
        slurm.check_start(RunDir(run_dir).job_script, excluded)
    except BadInput as error:
        problem = f"the job could not start otherwise ({error})"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    slurm.requeue(job)
    if not problem:
        try:
            slurm.exclude_nodes(job, excluded)
        except BadInput as error:
            problem = str(error)
    events.append(run_dir, "excluded", nodes=nodes, problem=problem)
