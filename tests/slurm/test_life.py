"""The life of runs on a real Slurm: two nodes of this machine, real jobs, real ranks."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.slurm.conftest import TWO_NODES

pytestmark = pytest.mark.slow  # of those that are not marked `full`
STEPS = 6
RUN = [*TWO_NODES, f"training.steps={STEPS}", "checkpoint.every_steps=1"]
ENDLESS = [*TWO_NODES, "schedule.stages=[{name: bdlm_4, block_size: '4', tokens: 81920000}]"]
ENDLESS += ["checkpoint.every_steps=50"]


def wait_for_steps(run, count: int) -> None:
    run.wait(lambda: len(run.losses()) >= count)


def ranks_of(run) -> list[int]:
    """Processes of the run's ranks, in whatever order."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if (
            "llada_megatron" in words
            and "train" in words
            and f"{run.directory}/config.yaml" in words
            and words[0] != "bash"
        ):
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def straight(slurm, corpus, tmp_path_factory):
    """A run that nothing interrupts."""
    from tests.slurm.conftest import Run

    run = Run(slurm, tmp_path_factory.mktemp("straight") / "run", corpus, *RUN)
    assert "plan: fits" in run.submit().stdout
    run.wait_for_end("finished")
    return run


def test_a_submitted_run_finishes_and_its_status_says_so(straight):
    status = straight.status()
    assert (status["state"], status["step"], status["steps"]) == ("finished", STEPS, STEPS)
    assert len(straight.losses()) == STEPS and status["checkpoint"] == STEPS and status["restarts"] == 0
    logs = straight.directory / "logs" / "attempt_000"
    assert [path.name for path in sorted(logs.iterdir())] == [f"rank_{rank:05d}.log" for rank in range(4)]
    assert "bdlm_4" in straight.llada("logs", str(straight.directory), "--rank", "0").stdout
    described = (straight.directory / "submission" / "submission.json").read_text()
    assert '"git_commit"' in described and '"plan"' in described


def test_a_requeued_run_goes_on_and_ends_with_the_same_losses(make_run, straight):
    run = make_run(*RUN)
    run.submit()
    wait_for_steps(run, 2)
    refused = run.submit(check=False)
    assert refused.returncode == 2 and "already submitted" in refused.stderr
    run.slurm.run("scontrol", "requeue", run.job())
    run.wait_for_end("finished")
    assert len(run.events("started")) == 2 and run.status()["restarts"] == 1
    assert run.losses() == straight.losses()


def test_a_killed_rank_ends_the_job_soon_and_the_run_goes_on(make_run, straight):
    run = make_run(*RUN)
    run.submit()
    wait_for_steps(run, 2)
    os.kill(ranks_of(run)[-1], signal.SIGKILL)
    killed = time.time()
    run.wait(lambda: run.events("ended"))
    assert run.events("ended")[0]["time"] - killed < 30 and run.events("ended")[0]["outcome"] == "again"
    run.wait_for_end("finished")
    assert run.losses() == straight.losses()


def test_a_preempted_run_saves_and_comes_back_and_a_stopped_one_resumes(make_run, straight):
    run = make_run(*ENDLESS)
    run.submit()
    wait_for_steps(run, 3)
    urgent = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--ntasks-per-node=2"]
    run.slurm.run(*urgent, "--output=/dev/null", "--wrap=sleep 2")
    run.wait(lambda: len(run.events("started")) == 2)
    [first] = run.events("ended")
    assert first["step"] >= 3 and run.events("signalled")[0]["signal"] == "SIGTERM"
    wait_for_steps(run, first["step"] + 1)
    assert run.events("first_step")[-1]["step"] == first["step"]
    run.llada("stop", str(run.directory))
    run.wait_for_end("stopped")
    run.wait(run.has_left_the_queue)
    stopped_at = run.status()["checkpoint"]
    run.llada("resume", str(run.directory))
    run.wait(lambda: len(run.events("first_step")) == 3)
    assert run.events("first_step")[-1]["step"] == stopped_at
    run.llada("stop", str(run.directory))
    run.wait(lambda: [event["outcome"] for event in run.events("ended")].count("stopped") == 2)
    assert run.losses()[:3] == straight.losses()[:3]


def test_a_time_limit_warns_the_ranks_and_the_run_goes_on_on_fewer_nodes_after_a_stop(make_run, straight):
    run = make_run(*ENDLESS)
    # Slurm may warn up to a minute early, and a run that is warned before its first step ends without one.
    run.submit("slurm.time_limit_min=2", "slurm.signal_lead_sec=20")
    run.wait(lambda: run.events("ended"))
    [first] = run.events("ended")
    assert first["outcome"] == "again", run.story()
    assert first["step"] > 0 and run.events("signalled")[0]["signal"] == "SIGUSR1"
    run.wait(lambda: len(run.events("first_step")) == 2)
    assert run.events("first_step")[-1]["step"] == first["step"]
    run.llada("stop", str(run.directory))
    run.wait_for_end("stopped")
    assert "llada stop" in run.status()["why"]
    before = run.status()["checkpoint"]
    run.wait(run.has_left_the_queue)
    one_node = ["cluster.nodes=1", "layout.processes=2", f"training.steps={before + 2}"]
    run.submit(*one_node)
    run.wait_for_end("finished")
    assert len(run.losses()) == before + 2
    assert run.losses()[:3] == straight.losses()[:3]


@pytest.mark.full
def test_a_lost_node_brings_the_run_back_when_it_returns(make_run, straight):
    run = make_run(*RUN)
    run.submit()
    wait_for_steps(run, 2)
    run.slurm.kill_node("node2")
    run.wait(
        lambda: run.events("ended") or len(run.events("started")) == 2 or run.status()["state"] == "pending"
    )
    run.slurm.start_node("node2")
    run.wait_for_end("finished")
    assert run.losses() == straight.losses()


@pytest.mark.full
def test_failures_in_a_row_stop_at_the_cap_and_hostile_names_are_only_names(make_run, tmp_path):
    hostile = "a b'c\"d$(touch pwned)`touch pwned`;%j&\nnew"
    run = make_run(*RUN, name=hostile)
    run.directory.parent.chmod(0o755)
    run.submit("slurm.python=/bin/false", "run.name='$(touch pwned)\\'\\n--wrap=x'")
    run.wait(lambda: any(event["outcome"] == "failed" for event in run.events("ended")))
    assert [event["outcome"] for event in run.events("ended")] == ["again", "again", "failed"]
    assert "3 failures in a row" in run.status()["why"]
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()


def test_a_disk_quota_leaves_the_last_checkpoint_and_says_why(make_run):
    run = make_run(*RUN)
    run.submit("training.steps=1")
    run.wait_for_end("finished")
    whole = [path.name for path in (run.directory / "checkpoints").iterdir()]
    run.wait(run.has_left_the_queue)
    run.submit("slurm.setup=['ulimit -f 100']", "run.max_failures=1")
    run.wait(lambda: any(event["outcome"] == "failed" for event in run.events("ended")))
    assert "written" in run.status()["why"], run.story()  # the preflight notices it before a save does
    assert [path.name for path in (run.directory / "checkpoints").glob("step_*")] == whole


def test_status_and_a_dry_run_need_no_torch(straight):
    code = (
        "import sys; from llada_megatron.cli import main; main(sys.argv[1:]);"
        " sys.exit(any(name.split('.')[0] == 'torch' for name in sys.modules))"
    )
    for arguments in (["status", str(straight.directory)], ["submit", *straight.overrides, "--dry-run"]):
        done = subprocess.run(
            ["python", "-c", code, *arguments],
            env={
                **straight.slurm.environment,
                "PATH": f"{Path(os.sys.executable).parent}:{os.environ['PATH']}",
            },
            cwd=straight.directory.parent,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
