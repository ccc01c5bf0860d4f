"""What happened to a run: one line per event in RUN/events.jsonl, appended and never rewritten.

Written by the submission, by the job around the training, and by rank 0; read by status and cost. Standard
library only, since a batch script calls it with whatever Python a node has.

`submitted` (job), `started` (job, restart, nodes, devices, step), `first_step` (step, replayed), `saved`
(step, seconds that training waited), `published` (of a save in the background: step, seconds since it
began), `evaluated` (step, seconds), `stragglers` (step, slow: a clause for each slow rank, none when all
are well again), `global_batch` (a resume changed it: step, sample, before, now, the schedule's steps and
tokens), `signalled` (step, signal), `stop_asked`, `resumed`, `ended` (exit_code, step, outcome, reason),
`excluded` (nodes, problem: why they could not be, goes_on_with: so many nodes where they are fewer,
layout), `refused` (job, exit_code of config/errors.py, reason, nodes at fault), `left_out` (step, sequences
of the data, why), `spike` (step, samples: first and last, why it was skipped), `passed_over` (step,
samples: for training.skip_samples), `rolled_back` (step, to: the step of the checkpoint whose weights were
taken, samples: first and last that were passed over for that, why), `hot_experts` (step, layer, rank, rows
of one micro-batch that the rank's experts got, over_mean: a peak past training.expert_rows_alarm), `copied`
(step, to: a URL), `not_copied` (step, why), `remembered` (a copy in the nodes' memory: step, seconds since
it began), `not_remembered` (step, why), `recalled` (step: a start has brought it back from there).
`time` is in seconds since 1970. `step` is the number of steps that are done.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from llada_megatron.config.foreign import parse_json, read_bytes
from llada_megatron.record.run_dir import RunDir

Event = dict[str, Any]


def append(run_dir: Path, event: str, **fields: Any) -> None:
    """Add an event to a run's record."""
    run_dir.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"event": event, "time": time.time(), **fields}) + "\n"
    handle = os.open(RunDir(run_dir).events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line.encode())  # one write: lines of several writers do not mix
    finally:
        os.close(handle)


def read(run_dir: Path) -> list[Event]:
    """The events of a run, oldest first; a torn line, and what is no event, is left out."""
    path = RunDir(run_dir).events
    if not path.exists():
        return []
    found = []
    for line in read_bytes(path, "remove it").decode(errors="replace").split("\n"):
        try:
            event = parse_json(line)
        except ValueError:
            continue
        if (
            isinstance(event, dict)
            and isinstance(event.get("event"), str)
            and isinstance(event.get("time"), int | float)
        ):
            found.append(event)
    return found


def last(events: list[Event], *names: str) -> Event | None:
    """The newest event of one of these names."""
    return next((event for event in reversed(events) if event["event"] in names), None)
