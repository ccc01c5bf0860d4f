"""What follows from how attempts ended; Slurm itself is in tests/slurm."""

import os
import time
from pathlib import Path

from llada_megatron.commands import logs
from llada_megatron.jobs import attempts
from llada_megatron.record import events
from llada_megatron.record.run_dir import RunDir, rank_log


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


def test_a_failed_preflight_is_tried_again_since_other_nodes_may_come(tmp_path):
    error = "Preflight failed on 1 of 4 ranks: Node node2 (rank 3): its clock is 60 s off"
    assert attempt(tmp_path, 2, error=error).outcome == "again"


def test_a_run_that_ranks_of_a_lost_node_still_hold_is_tried_again(tmp_path):
    error = "runs/a is being trained by process 7 on node2: wait for it, stop it, or choose another run.dir."
    assert attempt(tmp_path, 2, error=error).outcome == "again"


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
    from llada_megatron.config.compose import compose, save

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
