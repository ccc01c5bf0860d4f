"""Train a model for some steps with a profile, and hold time and memory against the plan.

    python -m tests.gpu.measured_step DIR KEY=VALUE ...

Writes DIR/measured.json, and DIR/run as any run. The run is killed when it has been measured: it would save.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from llada_megatron.record.json_files import write_json
from llada_megatron.record.metrics import read_jsonl
from llada_megatron.record.run_dir import RunDir
from tests.gpu.devices import cuda_devices

CLUSTERS = ("h100", "h200", "b200")
WARM_STEPS, STEPS, PROFILED = 3, 12, 2
POLL_SEC = 0.5
LLADA = [sys.executable, "-m", "llada_megatron"]


def cluster_of(device: str) -> str:
    """The description of a device; that of an H100 where there is none."""
    return next((name for name in CLUSTERS if name in device.lower()), CLUSTERS[0])


def planned(folder: Path, settings: list[str]) -> dict[str, Any]:
    """Seconds and bytes of the plan. Experts are balanced in it: the run's first weights route evenly."""
    device = (cuda_devices() or [""])[0]
    cluster = cluster_of(device)
    one = [f"cluster={cluster}", "cluster.nodes=1", "cluster.gpus_per_node=1"]
    file = folder / "plan.json"
    # Exit code 1: it does not fit by the plan; the run will show.
    subprocess.run([*LLADA, "plan", "--expert-imbalance", "1", "--json", str(file), *settings, *one])
    found = json.loads(file.read_text())
    (stage,), (rank,) = found["stages"], found["ranks"]
    assumed = (
        f"Planned for {cluster} with even experts and one document a sequence; here is {device or 'a CPU'}."
    )
    return {"seconds": stage["step_seconds"], "bytes": sum(rank["parts"].values()), "assumed": assumed}


def measured(folder: Path, settings: list[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of the steps before the profile, and the profile's operators."""
    run = folder / "run"
    train = subprocess.Popen([*LLADA, "train", *settings, f"run.dir={run}"], start_new_session=True)
    try:
        while len(steps := read_jsonl(RunDir(run).metrics)) < WARM_STEPS + STEPS:
            if train.poll() is not None:
                sys.exit(f"the run ended by itself, with exit code {train.returncode}")
            time.sleep(POLL_SEC)
        subprocess.run([*LLADA, "profile", str(run), "--steps", str(PROFILED)], check=True)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(train.pid, signal.SIGKILL)
        train.wait()
    operators = next(iter(RunDir(run).profiles.glob("step_*/rank_00000.operators.json")))
    return steps[WARM_STEPS:], json.loads(operators.read_text())


def main(folder: str, *settings: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    plan = planned(out, list(settings))
    steps, operators = measured(out, list(settings))
    tokens = steps[-1]["consumed_tokens"] - steps[-2]["consumed_tokens"]
    seconds = statistics.median(tokens / step["tokens_per_sec"] for step in steps)
    memory = max(step["peak_memory_bytes"] for step in steps)
    compared = {"s/step": (plan["seconds"], seconds), "peak GB": (plan["bytes"] / 1e9, memory / 1e9)}
    reserved = steps[-1]["reserved_memory_bytes"]
    if reserved:
        compared["GB that torch holds, over the plan's peak"] = (plan["bytes"] / 1e9, reserved / 1e9)
    write_json(
        out / "measured.json",
        {"assumed": plan["assumed"], "compared": compared, "steps": steps, "operators": operators},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
