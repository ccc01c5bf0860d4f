"""A profile of a few steps of some ranks, of a run that goes on: the run's side of `llada profile`.

The verb leaves RUN/profile.json. Rank 0 looks for it once a step, and the ranks hear of it with the message
that agrees on stop signals; what it asks for is sent around where there is one, since the other nodes may not
see the file yet. From then on nobody needs another word: each rank that was named records the next steps,
writes its trace beside the others' and goes on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from llada_megatron.config.errors import BadInput
from llada_megatron.parallel.ranks import from_first_rank, warn
from llada_megatron.record.json_files import read_json, write_json
from llada_megatron.record.run_dir import RunDir, operators_of, trace_of
from llada_megatron.runtime.profiler import Profiler, marked
from llada_megatron.training.step import Trainer


class Profiling:
    """What this rank records of its run; every rank calls each method at the same step."""

    def __init__(self, run_dir: Path, trainer: Trainer) -> None:
        self.files, self.trainer = RunDir(run_dir), trainer
        self.is_due = False
        """Whether the ranks have agreed that there is a request."""
        self._ends_at = 0
        self._profiler: Profiler | None = None
        self._folder = self.files.profiles
        self._section = trainer.section

    def is_asked(self) -> bool:
        """Whether rank 0 sees a request that can be served now; False on the others."""
        return dist.get_rank() == 0 and not self._ends_at and self.files.profile_request.exists()

    def begin(self, step: int) -> None:
        """Before a step: record from here on, where that is due."""
        if not self.is_due:
            return
        self.is_due = False
        request = from_first_rank(self._taken, step)
        if request is None:
            return
        self._ends_at, self._folder = step + request["steps"], self.files.profile(step)
        if dist.get_rank() in request["ranks"]:
            self._profiler = Profiler(ranges_alone=request["nsys"])
            self._section, self.trainer.section = self.trainer.section, marked
            self._profiler.start()

    def end(self, step: int) -> None:
        """After `step` steps: write what was recorded, where it is whole."""
        if step >= self._ends_at:
            self.close()

    def close(self) -> None:
        """Write what was recorded so far. A profile that cannot be written does not end a run."""
        self._ends_at = 0
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        self.trainer.section = self._section
        profiler.stop()
        rank = dist.get_rank()
        try:
            trace = trace_of(self._folder, rank)
            aside = trace.with_name(f".{trace.name}")
            profiler.write_trace(aside)
            if aside.exists():
                os.replace(aside, trace)
            write_json(operators_of(self._folder, rank), profiler.operators())  # the verb waits for it
        except (OSError, RuntimeError) as error:
            print(f"warning: rank {rank} could not write its profile: {error}", file=sys.stderr, flush=True)

    def _taken(self, step: int) -> dict[str, Any] | None:
        """The request, which is one no more; None, with a warning, for a file that is none."""
        asked = self.files.profile_request
        try:
            request = read_json(asked, "delete it")
            taken = self.files.profile(step)
            taken.mkdir(parents=True, exist_ok=True)
            os.replace(asked, taken / asked.name)
            return {
                "steps": int(request["steps"]),
                "ranks": list(request["ranks"]),
                "nsys": bool(request["nsys"]),
            }
        except (BadInput, OSError, KeyError, TypeError, ValueError) as error:
            warn(f"the profile that {asked} asks for was not made: {error}")
            asked.unlink(missing_ok=True)
            return None
