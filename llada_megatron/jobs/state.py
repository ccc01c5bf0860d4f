"""Whether a run is running, and why not: from its record and, where it was submitted, from Slurm."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path

from llada_megatron.config.quantities import so_many
from llada_megatron.jobs import slurm
from llada_megatron.record import events
from llada_megatron.record.events import Event
from llada_megatron.record.run_dir import RunDir

FINAL = ("finished", "stopped", "failed")
FRESH_SEC = 600
"""A run without a job counts as running when its record is younger than this."""
NAMED = 3
"""So many slow ranks are named."""


def state_of(run_dir: Path, record: list[Event], steps: int) -> tuple[str, str]:
    """The state of a run of so many steps, and why it stopped or which ranks are slow."""
    if RunDir(run_dir).newest_step() >= steps:
        return "finished", ""
    state, why = _state(run_dir, record)
    if state == "running":
        why = "; ".join(filter(None, [stragglers(record), why]))
    return state, why


def trainer_of(run_dir: Path) -> str:
    """Who holds the lock of guard/exclusive.py, in words; empty while nobody trains here."""
    try:
        with open(RunDir(run_dir).lock, encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read() or "another process"
    except FileNotFoundError:
        pass
    except OSError:  # no locks on this file system
        return "whoever trains here"
    return ""


def stragglers(record: list[Event]) -> str:
    """The ranks that the others wait for in this attempt, a few of them."""
    newest = events.last(record, "started", "stragglers")
    slow = newest.get("slow", []) if newest else []
    more = f" and {len(slow) - NAMED} more" if len(slow) > NAMED else ""
    return f"slow: {', '.join(slow[:NAMED])}{more}" if slow else ""


def _state(run_dir: Path, record: list[Event]) -> tuple[str, str]:
    newest = events.last(record, "submitted", "started", "ended")
    job = events.last(record, "submitted")
    in_queue = slurm.state(job["job"]) if job else ""
    ended = events.last(record, "ended")
    why = ended["reason"] + _excluded(record) if ended else ""
    if newest is None:
        metrics = RunDir(run_dir).metrics
        recent = metrics.exists() and time.time() - metrics.stat().st_mtime < FRESH_SEC
        return ("running" if recent else "not running"), ""
    if newest["event"] == "ended" and newest["outcome"] in FINAL:
        return newest["outcome"], why
    if in_queue in slurm.ACTIVE:
        return in_queue.lower(), why
    if job is None:
        return ("running" if newest["event"] == "started" else "stopped"), why
    if newest["event"] == "ended":
        return "stopped", why
    return "lost", f"job {job['job']} is {in_queue.lower() or 'unknown to Slurm'} and recorded no end"


def _excluded(record: list[Event]) -> str:
    """What became of the nodes that the newest attempt's preflight named."""
    newest = events.last(record, "ended", "excluded")
    if newest is None or newest["event"] == "ended":
        return ""
    nodes = ", ".join(newest["nodes"])
    if newest["problem"]:
        return f"; {nodes} not left out: {newest['problem']}"
    fewer = newest.get("goes_on_with")
    on = f", on {so_many(fewer, 'node')} with {newest['layout']}" if fewer else ""
    return f"; {nodes} left out since{on}"
