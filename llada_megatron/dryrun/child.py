"""Starts the dry run in a process of its own, so that whoever asks needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from llada_megatron.config.compose import save
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config


def dry_run(
    config: Config, stage: Stage, ranks: list[int], micro_batches: int, *, count_only: bool = False
) -> Iterator[dict[str, Any]]:
    """Reports of the ranks, one after another, from a child process; RuntimeError when it fails."""
    with tempfile.TemporaryDirectory(prefix="llada_plan_") as folder:
        save(config, f"{folder}/config.yaml")
        command = [sys.executable, "-m", "llada_megatron.dryrun.rank", f"{folder}/config.yaml", stage.name]
        command += [str(micro_batches), *map(str, ranks), *(["--count-only"] if count_only else [])]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with (
            open(f"{folder}/errors", "w+", encoding="utf-8") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            ) as child,
        ):
            try:
                assert child.stdout is not None
                for line in child.stdout:
                    yield json.loads(line)
            finally:
                if child.poll() is None:
                    child.terminate()
            if child.wait():
                errors.seek(0)
                raise RuntimeError(f"the dry run failed:\n{errors.read()[-4000:]}")
