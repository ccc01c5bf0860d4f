"""Slurm's own programs: submit, ask, signal, requeue, account. Nothing here passes through a shell."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.config.errors import BadInput

ACTIVE = {
    "PENDING",
    "RUNNING",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
}
TIMEOUT_SEC = 30


@dataclass(frozen=True)
class Allocation:
    """One start of a job, by Slurm's accounting; seconds since 1970."""

    queued_at: float
    """When nothing but the queue held it back any more: it could have started, or was requeued."""
    started_at: float
    ended_at: float | None
    """None while it runs."""


def available() -> bool:
    """Whether this machine has Slurm's programs."""
    return shutil.which("sbatch") is not None


def sbatch(arguments: list[str]) -> str:
    """Submit; returns the job's id. Raises BadInput with what Slurm said."""
    return _run("sbatch", "--parsable", *arguments).split(";")[0].strip()


def state(job: str) -> str:
    """PENDING, RUNNING, ...; empty when Slurm does not know the job any more, or is not here."""
    if not available():
        return ""
    try:
        return _run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()
    except BadInput:
        return ""


def is_ending(job: str) -> bool:
    """Whether Slurm has ended the job of this batch script, or requeued it."""
    return state(job) not in ("RUNNING", "")


def is_active(job: str) -> bool:
    """Whether a job waits, runs or ends just now."""
    return state(job) in ACTIVE


def signal(job: str, name: str) -> None:
    """Send a signal to every rank of a job, and not to its batch script."""
    _run("scancel", f"--signal={name}", job)


def cancel(job: str) -> None:
    """End a job."""
    _run("scancel", job)


def requeue(job: str) -> None:
    """Put a running job back into the queue; the batch script that asks for it ends here."""
    _run("scontrol", "requeue", job)


def nodes_of(nodelist: str) -> list[str]:
    """The names behind Slurm's short form: node[1-2]."""
    return _run("scontrol", "show", "hostnames", nodelist).split()


def excluded_nodes(job: str) -> str:
    """Nodes that a job must not get, in Slurm's short form; empty without any."""
    return _run("squeue", "--noheader", "--states=all", "--format=%x", f"--jobs={job}").strip()


def check_start(script: Path, excluded: str, nodes: int) -> None:
    """Raises BadInput, with what Slurm says, when this job could not start on so many others."""
    _run("sbatch", "--test-only", f"--nodes={nodes}", f"--exclude={excluded}", str(script))


def exclude_nodes(job: str, excluded: str) -> None:
    """Set what `excluded_nodes` gives; Slurm allows it for jobs that wait."""
    _run("scontrol", "update", f"jobid={job}", f"ExcNodeList={excluded}")


def use_nodes(job: str, nodes: int, tasks: int) -> None:
    """Let a job that waits have so many nodes and tasks."""
    _run("scontrol", "update", f"jobid={job}", f"NumNodes={nodes}", f"NumTasks={tasks}", f"NumCPUs={tasks}")


def silent_nodes(nodes: list[str]) -> list[str]:
    """Those nodes of the job of this batch script on which nothing can be started any more."""

    def is_silent(node: str) -> bool:
        try:
            _run("srun", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--overlap", "--quiet", "true")
        except BadInput:
            return True
        return False

    with ThreadPoolExecutor(16) as pool:
        return [node for node, silent in zip(nodes, pool.map(is_silent, nodes), strict=True) if silent]


def down_nodes(nodes: list[str]) -> list[str]:
    """Those of these nodes that Slurm has given up, or that do not answer it."""
    listed = _run("sinfo", "--noheader", "--Node", "--format=%N %t", f"--nodes={','.join(nodes)}")
    states = dict(line.split() for line in listed.splitlines() if line.strip())
    return [
        node
        for node in nodes
        if states.get(node, "").startswith("down") or states.get(node, "").endswith("*")
    ]


def allocations(jobs: Iterable[str]) -> dict[str, list[Allocation]]:
    """Every start of these jobs by Slurm's accounting, oldest first; empty where a site has no accounting."""
    columns = "--format=JobIDRaw,Submit,Eligible,Start,End"
    command = ["sacct", "--allocations", "--duplicates", "--noheader", "--parsable2", columns]
    try:
        # Seconds since 1970: sacct prints local time otherwise, which is ambiguous for an hour each year.
        text = _run(*command, f"--jobs={','.join(jobs)}", SLURM_TIME_FORMAT="%s")
    except BadInput:
        return {}
    return parse_sacct(text)


def parse_sacct(text: str) -> dict[str, list[Allocation]]:
    """Lines `JobIDRaw|Submit|Eligible|Start|End` in seconds since 1970, one per start of a job.

    A requeued job's Submit is when its last start had been cleaned up, and its Eligible comes after a delay
    of Slurm's own; what it waited in the queue begins where the start before it ended.
    """
    found: dict[str, list[Allocation]] = defaultdict(list)
    lines = [line.split("|") for line in text.splitlines() if line.count("|") == 4]
    for job, *cells in lines:
        submitted, eligible, started, ended = (float(cell) if cell.isdigit() else None for cell in cells)
        if started is None:  # it waits
            continue
        before = found[job][-1].ended_at if found[job] else None
        queued = before or eligible or submitted or started
        found[job].append(Allocation(queued, started, ended))
    return found


def _run(*command: str, **variables: str) -> str:
    """Output of a command with these variables of the environment; BadInput when it fails."""
    try:
        done = subprocess.run(
            command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=TIMEOUT_SEC
        )
    except FileNotFoundError:
        raise BadInput(
            f"{command[0]} is not installed here: use a login node of the cluster, or `llada train`."
        ) from None
    except subprocess.TimeoutExpired:
        raise BadInput(f"{command[0]} gave no answer in {TIMEOUT_SEC} s: is the controller up?") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise BadInput(f"{command[0]} refused: {said}")
    return done.stdout
