"""The attempts of a run: what a job records before and after the ranks, and whether it is requeued.

    python -m llada_megatron.jobs.attempts start RUN
    python -m llada_megatron.jobs.attempts end RUN EXIT_CODE --max-failures N [--exclude-failed-nodes]
    python -m llada_megatron.jobs.attempts lost RUN

The batch script calls them. Standard library only, as record/events.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.config.errors import BAD_INPUT
from llada_megatron.jobs import exclusion, slurm
from llada_megatron.record import events
from llada_megatron.record.events import Event
from llada_megatron.record.run_dir import RunDir, rank_logs

ERROR = re.compile(r"error: (.+)|^(\w+(?:Error|Exception)\b.*)|(Timeout \(.*\)!)")


@dataclass
class Verdict:
    """How an attempt ended.

    `finished`, `stopped` and `failed` are final; `again` is requeued by us, `yielded` was ended by Slurm,
    which requeues it after a preemption.
    """

    outcome: str
    reason: str


@dataclass
class Refused:
    """Why the ranks of an attempt refused to start or to go on, as they recorded it."""

    exit_code: int
    """Of config/errors.py."""
    reason: str
    nodes: list[str]
    """Those at fault."""


def refused(record: list[Event]) -> Refused | None:
    """What the ranks of the newest attempt recorded; a fault that another start may escape outranks the rest.

    An exit code would not tell: srun's is that of the ranks which it ended itself, if one failed before them.
    What another process records, which was not let in while this attempt trains, does not count.
    """
    starts = [index for index, event in enumerate(record) if event["event"] == "started"]
    since = record[starts[-1] :] if starts else []
    said = [event for event in since if event["event"] == "refused" and event["job"] == since[0].get("job")]
    if not said:
        return None
    worst = max(said, key=lambda event: event["exit_code"])
    return Refused(worst["exit_code"], worst["reason"], [node for event in said for node in event["nodes"]])


def count(record: list[Event]) -> int:
    """Attempts so far."""
    return sum(event["event"] == "started" for event in record)


def start(run_dir: Path, **where: object) -> int:
    """Record that an attempt starts; returns its number, from 0. One that never ended is recorded first."""
    record = events.read(run_dir)
    newest = events.last(record, "started", "ended")
    if newest is not None and newest["event"] == "started":
        reason = "it ended without a word: a node failed, or the job was preempted or killed"
        events.append(
            run_dir,
            "ended",
            time=_last_sign(run_dir, record),
            exit_code=None,
            step=RunDir(run_dir).newest_step(),
            outcome="again",
            reason=reason,
        )
    number = count(record)
    events.append(run_dir, "started", attempt=number, step=RunDir(run_dir).newest_step(), **where)
    return number


def decide(
    run_dir: Path, exit_code: int, *, max_failures: int, is_ending: bool = False, error: str = ""
) -> Verdict:
    """What follows from an exit code of config/errors.py, or whatever else a process ended with.

    `is_ending`: Slurm itself ends the job (cancelled, preempted). `error` is for people, looked up in the
    logs if empty; nothing is decided by its words.
    """
    stopped = RunDir(run_dir).stop.exists()
    if exit_code == 0:
        return Verdict("finished", "the schedule is done")
    if stopped:
        return Verdict("stopped", "`llada stop` was called; `llada resume` goes on")
    if signalled := _signalled(events.read(run_dir)):
        if is_ending:
            return Verdict("yielded", f"the job was cancelled or preempted ({signalled})")
        return Verdict("again", f"{signalled} asked for a checkpoint and a new start")
    reason = error or first_error(run_dir) or f"exit code {exit_code}"
    if exit_code == BAD_INPUT:
        return Verdict("failed", reason)
    failures = _failures_without_progress(run_dir) + 1
    if failures >= max_failures:
        return Verdict("failed", f"{failures} failures in a row without a new checkpoint, the last: {reason}")
    return Verdict("again", reason)


def end(run_dir: Path, exit_code: int, verdict: Verdict) -> None:
    """Record how an attempt ended."""
    step = RunDir(run_dir).newest_step()
    events.append(
        run_dir, "ended", exit_code=exit_code, step=step, outcome=verdict.outcome, reason=verdict.reason
    )


def first_error(run_dir: Path) -> str:
    """The most telling line of the newest attempt's logs: an error sentence first, then an exception."""
    run = RunDir(run_dir)
    sentences: list[str] = []
    exceptions: list[str] = []
    for log in rank_logs(run.attempt_logs(count(events.read(run_dir)) - 1)):
        rank = log.stem.removeprefix("rank_")
        for line in _tail(log).splitlines():
            if found := ERROR.search(line):
                (sentences if found[1] else exceptions).append(
                    f"{found[1] or found[2] or found[3]} (rank {rank})"
                )
    has_stacks = any(path.stat().st_size for path in run.all_stacks())
    stacks = [f"no progress, stacks in {run.stacks}"] if has_stacks else []
    return next(iter([*sentences, *stacks, *exceptions]), "")


def _signalled(record: list[Event]) -> str:
    """The signal at which the newest attempt saved and left; empty if none did.

    The ranks record it. An exit code would not tell: srun ends the others with SIGTERM when one rank fails.
    """
    newest = events.last(record, "started", "signalled")
    return newest["signal"] if newest and newest["event"] == "signalled" else ""


def _failures_without_progress(run_dir: Path) -> int:
    """Failed attempts since one left a newer checkpoint, was asked to leave, or lost its node."""
    failures = begun_at = 0
    asked = False
    for event in events.read(run_dir):
        if event["event"] == "started":
            begun_at, asked = event["step"], False
        elif event["event"] == "signalled":
            asked = True
        elif event["event"] == "resumed":
            failures = 0
        elif event["event"] == "ended":
            failed = event["exit_code"] is not None and not asked and event["step"] <= begun_at
            failures = failures + 1 if failed else 0
    return 0 if RunDir(run_dir).newest_step() > begun_at else failures


def _last_sign(run_dir: Path, record: list[Event]) -> float:
    """When the newest attempt last wrote something, in seconds since 1970; after that the run waited."""
    run = RunDir(run_dir)
    files = [run.metrics, *rank_logs(run.attempt_logs(count(record) - 1))]
    return max([record[-1]["time"], *(file.stat().st_mtime for file in files if file.exists())])


def _tail(path: Path, size: int = 100_000) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")


def main(arguments: list[str]) -> int:
    """`start RUN` prints the folder for the ranks' logs; `end RUN CODE` requeues when it should.

    `lost RUN` lets a job that Slurm ends for a node that is gone do without it.
    """
    parser = argparse.ArgumentParser(prog="python -m llada_megatron.jobs.attempts")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start").add_argument("run_dir", type=Path)
    commands.add_parser("lost").add_argument("run_dir", type=Path)
    ending = commands.add_parser("end")
    ending.add_argument("run_dir", type=Path)
    ending.add_argument("exit_code", type=int)
    ending.add_argument("--max-failures", type=int, required=True)
    ending.add_argument("--exclude-failed-nodes", action="store_true")
    args = parser.parse_args(arguments)
    job = os.environ.get("SLURM_JOB_ID", "")
    match args.command:
        case "start":
            return _start_job(args.run_dir, job)
        case "lost":
            _leave_out_lost(args.run_dir, job)
            return 128 + signal.SIGTERM
    return _end_job(args, job)


def _start_job(run_dir: Path, job: str) -> int:
    newest = events.last(events.read(run_dir), "submitted", "ended")
    if newest and newest.get("outcome") == "finished":  # requeued by hand; a new submission asks for more
        print(f"{run_dir} is finished", file=sys.stderr)
        return 1
    nodes, tasks_per_node = _size()
    number = start(
        run_dir,
        job=job,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        nodes=os.environ.get("SLURM_JOB_NODELIST", ""),
        devices=nodes * tasks_per_node,
    )
    files = RunDir(run_dir)
    if files.config_on(nodes).is_file():  # the layout of the attempt before may have been another one
        aside = files.config.with_name(f".{files.config.name}.partial")
        shutil.copyfile(files.config_on(nodes), aside)
        os.replace(aside, files.config)
    folder = files.attempt_logs(number)
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
    return 0


def _size() -> tuple[int, int]:
    """Nodes of this job, and tasks on each; SLURM_NTASKS stays what the submission asked for."""
    names = ("SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE")
    nodes, tasks = (int(os.environ.get(name, "1")) for name in names)
    return nodes, tasks


def _end_job(args: argparse.Namespace, job: str) -> int:
    is_ending = slurm.is_ending(job)
    if is_ending and _leave_out_lost(args.run_dir, job):
        return args.exit_code
    refusal = refused(events.read(args.run_dir)) if args.exit_code else None
    code, error = (refusal.exit_code, refusal.reason) if refusal else (args.exit_code, "")
    verdict = decide(args.run_dir, code, max_failures=args.max_failures, is_ending=is_ending, error=error)
    end(args.run_dir, args.exit_code, verdict)
    print(f"{verdict.outcome}: {verdict.reason}", flush=True)
    if verdict.outcome == "again":  # requeued, the job ends here and waits in the queue again
        if failed := _nodes_to_leave_out(args, refusal):
            nodes, tasks_per_node = _size()
            exclusion.go_on_without(
                args.run_dir, job, failed, had=nodes, tasks_per_node=tasks_per_node, requeue=True
            )
        else:
            slurm.requeue(job)
    return args.exit_code


def _leave_out_lost(run_dir: Path, job: str) -> bool:
    """Whether Slurm ended the job for a node that is gone: it then has requeued it with as many as before."""
    if not RunDir(run_dir).node_counts():
        return False
    of_job = slurm.nodes_of(os.environ.get("SLURM_JOB_NODELIST", ""))
    lost = exclusion.failed_nodes(slurm.down_nodes(of_job), of_job)
    if lost:
        nodes, tasks_per_node = _size()
        exclusion.go_on_without(run_dir, job, lost, had=nodes, tasks_per_node=tasks_per_node)
    return bool(lost)


def _nodes_to_leave_out(args: argparse.Namespace, refusal: Refused | None) -> list[str]:
    """Nodes that failed the preflight, and of a run that may have fewer also those that are gone."""
    may_have_fewer = bool(RunDir(args.run_dir).node_counts())
    blamed = list(refusal.nodes) if refusal and (args.exclude_failed_nodes or may_have_fewer) else []
    if not blamed and not may_have_fewer:
        return []
    of_job = slurm.nodes_of(os.environ.get("SLURM_JOB_NODELIST", ""))
    if may_have_fewer and not _signalled(events.read(args.run_dir)):
        blamed += slurm.silent_nodes(of_job)
    return exclusion.failed_nodes(blamed, of_job)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
