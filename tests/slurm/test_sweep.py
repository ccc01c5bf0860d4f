"""How many runs of a sweep Slurm starts at a time."""

import json

import pytest

pytestmark = pytest.mark.full


def test_with_max_parallel_one_the_next_run_of_a_sweep_waits_for_a_requeued_one(make_run, tmp_path):
    python = tmp_path / "python"  # ranks that only take their time: each run is one task on a core
    python.write_text("#!/bin/bash\nsleep 6\n")
    python.chmod(0o755)
    run = make_run("run.name=swept", f"slurm.python={python}", "run.seed=1,2")
    run.llada("submit", "--multirun", "--max-parallel", "1", *run.overrides)
    first, second = (tmp_path / "runs" / f"swept_seed-{seed}" / "events.jsonl" for seed in (1, 2))

    def of(file, name):
        found = [json.loads(line) for line in file.read_text().splitlines()]
        return [event for event in found if event["event"] == name]

    run.wait(lambda: of(first, "started"))
    run.slurm.run("scontrol", "requeue", of(first, "submitted")[0]["job"])
    run.wait(lambda: of(second, "ended"))
    assert len(of(first, "started")) == 2 and of(first, "ended")[-1]["outcome"] == "finished"
    assert of(second, "started")[0]["time"] >= of(first, "ended")[-1]["time"]
