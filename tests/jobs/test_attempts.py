"""What follows from how attempts ended; Slurm itself is in tests/slurm."""

import os
import time
from pathlib import Path
from unittest import mock

import pytest

from llada_megatron.commands import logs, train
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import FAILED, BadInput, NodeFault, Refusal, RunFailed, RunHeld
from llada_megatron.jobs import attempts, slurm
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir, rank_log
from llada_megatron.runtime.launch import WorkerError


def save(run_dir: Path, step: int) -> None:
    folder = run_dir / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()


def attempt(
    run_dir: Path, exit_code: int, *, saves: int = 0, signal: str = "", **options
) -> attempts.Verdict:
    attempts.start(run_dir, job="1")
    if saves:
        save(run_dir, saves)
    if signal:
        events.append(run_dir, "signalled", signal=signal, step=saves)
    verdict = attempts.decide(run_dir, exit_code, max_failures=3, **options)
    attempts.end(run_dir, exit_code, verdict)
    return verdict


def test_three_failures_in_a_row_without_a_checkpoint_are_the_end(tmp_path):
    assert [attempt(tmp_path, 1).outcome for _ in range(3)] == ["again", "again", "failed"]


def test_progress_and_signals_start_the_count_anew(tmp_path):
    story = [attempt(tmp_path, 1), attempt(tmp_path, 1), attempt(tmp_path, 137, saves=5)]
    story += [attempt(tmp_path, 1), attempt(tmp_path, 138, signal="SIGUSR1"), attempt(tmp_path, 1)]
    assert {verdict.outcome for verdict in story} == {"again"}
    events.append(tmp_path, "resumed")
    assert [attempt(tmp_path, 1).outcome for _ in range(3)] == ["again", "again", "failed"]


def test_ranks_that_srun_ended_with_sigterm_failed_unless_they_say_that_they_left(tmp_path):
    assert attempt(tmp_path, 143).reason == "exit code 143"
    assert attempt(tmp_path, 143, signal="SIGTERM").outcome == "again"
    assert attempt(tmp_path, 143, signal="SIGTERM", is_ending=True).outcome == "yielded"


SENTENCES = [
    "",
    "error: Preflight failed on n1",
    "runs/a is being trained by process 7",
    "Node n2 (rank 1): no",
]
"""Said by whichever class: what follows must not depend on it."""
KINDS = {
    "bad input": (BadInput, "failed"),
    "node fault": (lambda sentence: NodeFault(sentence, ["n1"]), "again"),
    "held": (RunHeld, "again"),
    "failed": (RunFailed, "again"),
    "bug": (ValueError, "again"),
}
"""What a rank raises, and what follows at its first failure."""


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_supervised_attempt_is_judged_by_the_class_alone(tmp_path, monkeypatch, kind, sentence):
    error, outcome = KINDS[kind]
    raised = WorkerError(sentence) if kind == "bug" else error(sentence)

    def fail(*_worker, **_options):
        raise raised

    monkeypatch.setattr(train.launch, "launch", fail)
    config = compose(["experiment=parity", f"run.dir={tmp_path}", "run.max_failures=2"])
    with pytest.raises(type(raised)):
        train.supervise(config)
    ended = [event for event in events.read(tmp_path) if event["event"] == "ended"]
    assert [event["outcome"] for event in ended] == ["failed"] if outcome == "failed" else ["again", "failed"]
    assert {event["exit_code"] for event in ended} == {getattr(raised, "exit_code", FAILED)}


@pytest.fixture
def job(monkeypatch):
    """This process as the batch script of job 7 on n1 and n2; what it asks of Slurm."""
    asked = []

    def answer(*command, **_variables):
        asked.append(" ".join(command))
        return {"squeue": "RUNNING", "scontrol": "n1 n2"}.get(command[0], "") if "%x" not in asked[-1] else ""

    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "available", lambda: True)
    monkeypatch.setattr(slurm, "_run", answer)
    return asked


def test_a_job_that_slurm_ends_for_a_node_before_its_script_has_goes_on_without_it(
    tmp_path, monkeypatch, job
):
    """srun may hear of the node first, and the script is then at its last command."""
    answers = {"squeue": "PENDING", "scontrol": "n1 n2", "sinfo": "n1 idle\nn2 down*"}

    def answer(*command, **_variables):
        job.append(" ".join(command))
        return "" if "--format=%x" in command else answers.get(command[0], "")

    monkeypatch.setattr(slurm, "_run", answer)
    files = RunDir(tmp_path)
    files.submission.mkdir()
    for nodes in (1, 2):
        files.config_on(nodes).touch()
    attempts.start(tmp_path, job="7")
    assert attempts.main(["end", str(tmp_path), "1", "--max-failures", "3"]) == 1
    assert events.last(events.read(tmp_path), "excluded")["nodes"] == ["n2"]
    assert any("ExcNodeList=n2" in command for command in job) and "scontrol requeue 7" not in job
    assert not events.last(events.read(tmp_path), "ended")


def end_job(run_dir: Path, code: int) -> str:
    """What the record says after the batch script's last word."""
    options = ["--max-failures", "3", "--exclude-failed-nodes"]
    assert attempts.main(["end", str(run_dir), str(code), *options]) == code
    return events.last(events.read(run_dir), "ended")["outcome"]


@pytest.mark.parametrize("sentence", SENTENCES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_job_is_requeued_and_loses_nodes_by_the_class_alone(tmp_path, monkeypatch, job, kind, sentence):
    error, outcome = KINDS[kind]
    attempts.start(tmp_path, job="7")
    monkeypatch.setenv("RANK", "0")  # as under srun, whose exit code may be that of a rank it ended
    monkeypatch.setattr(train, "_worker", mock.Mock(side_effect=error(sentence)))
    config = compose(["experiment=parity", f"run.dir={tmp_path}"])
    with pytest.raises((Refusal, ValueError)) as raised:
        train.train(config)
    assert str(raised.value) == sentence
    assert end_job(tmp_path, 143) == outcome
    assert ("scontrol requeue 7" in job) == (outcome == "again")
    excluded = [event["nodes"] for event in events.read(tmp_path) if event["event"] == "excluded"]
    assert excluded == ([["n1"]] if kind == "node fault" else [])
    assert any("ExcNodeList=n1" in command for command in job) == bool(excluded)


@pytest.mark.parametrize(
    "code, outcome", [(1, "again"), (2, "failed"), (3, "again"), (4, "again"), (137, "again")]
)
def test_without_a_record_of_the_refusal_the_exit_code_tells(tmp_path, job, code, outcome):
    attempts.start(tmp_path, job="7")
    assert end_job(tmp_path, code) == outcome


def test_what_another_process_refused_is_no_reason_of_this_attempt(tmp_path, job):
    refused = {"exit_code": 2, "reason": "bad", "nodes": []}
    events.append(tmp_path, "refused", job="7", **refused)  # by an attempt that has ended
    attempts.start(tmp_path, job="7")
    events.append(tmp_path, "refused", job="", **refused)  # by somebody who tried the same run by hand
    assert end_job(tmp_path, 1) == "again"


def test_bad_input_is_not_tried_again_and_a_stop_is_not_overruled(tmp_path):
    assert attempt(tmp_path / "bad", 2).outcome == "failed"
    assert attempt(tmp_path / "done", 0).outcome == "finished"
    attempts.start(tmp_path / "stopped")
    RunDir(tmp_path / "stopped").stop.touch()
    assert attempts.decide(tmp_path / "stopped", 138, max_failures=3).outcome == "stopped"


def test_an_attempt_that_recorded_no_end_ended_with_its_last_sign_of_life(tmp_path):
    attempts.start(tmp_path, job="1")
    log = rank_log(RunDir(tmp_path).attempt_logs(0), 0)
    log.parent.mkdir(parents=True)
    log.touch()
    last_sign = int(time.time()) + 10
    os.utime(log, times=(last_sign, last_sign))
    assert attempts.start(tmp_path, job="1") == 1
    [ended] = [event for event in events.read(tmp_path) if event["event"] == "ended"]
    assert ended["exit_code"] is None and "node failed" in ended["reason"] and ended["time"] == last_sign


def test_errors_come_first_in_the_merged_log_and_name_their_rank(tmp_path):
    attempts.start(tmp_path)
    folder = RunDir(tmp_path).attempt_logs(0)
    folder.mkdir(parents=True)
    rank_log(folder, 0).write_text("step 1\nstep 2\n")
    rank_log(folder, 3).write_text("step 1\nllada train: error: no space\n")
    assert attempts.first_error(tmp_path) == "no space (rank 00003)"
    text = logs.merged(sorted(folder.iterdir()), [])
    assert text.index("no space") < text.index("step 2")


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path, monkeypatch, capsys):
    from llada_megatron.cli import main
    from llada_megatron.config.compose import save

    for name in ("old", "new"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        save(compose(["experiment=parity", f"run.name={name}"]), tmp_path / "runs" / name / "config.yaml")
    with (tmp_path / "runs" / "old" / "config.yaml").open("a") as file:
        file.write("gone: 1\n")
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[1:]] == ["not", "unreadable"]
    assert main(["status", "runs/old"]) == 2


def test_the_record_of_a_run_from_before_refusals_were_recorded_is_understood(tmp_path, job, capsys):
    from llada_megatron.cli import main
    from llada_megatron.config.compose import save

    save(compose(["experiment=parity", f"run.dir={tmp_path}"]), tmp_path / "config.yaml")
    ended = {"exit_code": 2, "step": 0, "outcome": "failed", "reason": "Preflight failed on n1"}
    events.append(tmp_path, "submitted", job="7")
    events.append(tmp_path, "started", attempt=0, step=0, job="7", nodes="n1", devices=1)
    assert attempts.refused(events.read(tmp_path)) is None
    events.append(tmp_path, "ended", **ended)
    assert main(["status", str(tmp_path)]) == 0
    assert "Preflight failed on n1" in capsys.readouterr().out
    assert main(["cost", str(tmp_path)]) == 0
