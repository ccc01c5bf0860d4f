"""Slurm's own programs: submit, ask, signal, requeue. Nothing here passes through a shell."""

from __future__ import annotations

import shutil
import subprocess

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


def available() -> bool:
    """Whether this machine has Slurm's programs."""
    return shutil.which("sbatch") is not None


def sbatch(arguments: list[str]) -> str:
    """Submit; returns the job's id. Raises ValueError with what Slurm said."""
    return _run("sbatch", "--parsable", *arguments).split(";")[0].strip()


def state(job: str) -> str:
    """PENDING, RUNNING, ...; empty when Slurm does not know the job any more, or is not here."""
    if not available():
        return ""
    try:
        return _run("squeue", "--noheader", "--states=all", "--format=%T", f"--jobs={job}").strip()
    except ValueError:
        return ""


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


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SEC)
    except FileNotFoundError:
        raise ValueError(
            f"{command[0]} is not installed here: use a login node of the cluster, or `llada train`."
        ) from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} gave no answer in {TIMEOUT_SEC} s: is the controller up?") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise ValueError(f"{command[0]} refused: {said}")
    return done.stdout
