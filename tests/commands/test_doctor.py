"""`llada doctor`: a line for each thing that matters, its exit code, and advice for what is missing."""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron.commands import doctor
from llada_megatron.commands.doctor import Finding, State
from llada_megatron.config.errors import BadInput


def run_here(monkeypatch, tmp_path, *findings):
    monkeypatch.setattr(doctor, "CHECKS", tuple(lambda finding=finding: finding for finding in findings))
    return doctor.run(argparse.Namespace(runs=tmp_path, json=tmp_path / "doctor.json"))


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_this_machine_can_train_without_a_gpu_slurm_git_or_containers(tmp_path):
    command = [sys.executable, "-m", "llada_megatron", "doctor", "--runs", "a/b", "--json", "found.json"]
    environment = {**os.environ, "PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    *lines, empty, verdict = done.stdout.splitlines()
    assert verdict == "llada train can run here, on the CPU." and not empty
    found = json.loads((tmp_path / "found.json").read_text())
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert found["can_train"] and [line.split()[1] for line in lines] == list(states)
    assert max(len(line) for line in lines[:-1]) < 130  # the last one holds this folder's path
    needed = ("python", "packages", "torch", "collectives", "megatron-core", "disk")
    needed += ("layers", "optimizer", "attention")
    assert all(states[name] == "ok" for name in needed)
    assert all(states[name] == "-" for name in ("cuda", "slurm", "containers", "git"))
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"], "nothing else is left behind"


def test_what_a_run_would_compute_with_is_missing_where_nothing_serves():
    def refuse():
        raise BadInput("portable does not train on CUDA: set another")

    def fail():
        raise ImportError("libcudart.so.13: cannot open shared object file")

    assert doctor.engine("attention", refuse).state is State.missing
    found = doctor.engine("optimizer", fail)
    assert found.state is State.missing and "libcudart.so.13" in found.text
    assert doctor.attention().text == "portable, in bf16 with a head_dim of 128"


def test_the_exit_code_is_1_and_the_last_line_names_what_is_missing(monkeypatch, tmp_path, capsys):
    missing, absent = Finding("torch", State.missing, "gone"), Finding("slurm", State.absent, "")
    assert run_here(monkeypatch, tmp_path, absent) == 0
    assert run_here(monkeypatch, tmp_path, missing, absent) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "llada train needs: torch"
    assert json.loads((tmp_path / "doctor.json").read_text())["can_train"] is False


def test_a_package_of_the_wrong_version_or_none_is_missing_with_what_to_do(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "wandb":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.13.0" if name == "torch" else real(name)

    assert doctor.packages().state is State.ok
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = doctor.packages()
    assert found.state is State.missing and found.text.endswith(": make setup")
    assert "torch 1.13.0 is not <2.15,>=2.13" in found.text and "wandb is not installed" in found.text


def test_a_prerelease_of_nvidias_image_fits(monkeypatch):
    real = importlib.metadata.version
    nvidias = "2.14.0a0+b2c75dd062.nv26.9"
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: nvidias if name == "torch" else real(name)
    )
    assert doctor.packages().state is State.ok


def test_a_place_for_runs_that_cannot_be_written_is_missing(tmp_path):
    (tmp_path / "file").touch()
    found = doctor.disk(tmp_path / "file")
    assert found.state is State.missing and "set run.dir to another place" in found.text


@pytest.mark.parametrize(
    ("ping", "state", "clause"),
    [
        (
            "Slurmctld(primary) at login1 is UP\nSlurmctld(backup) at login2 is DOWN",
            State.ok,
            "login1 answers",
        ),
        ("Slurmctld(primary) at login1 is DOWN", State.absent, "no controller answers"),
    ],
)
def test_slurm_counts_when_a_controller_answers(monkeypatch, tmp_path, ping, state, clause):
    for name in doctor.SLURM_PROGRAMS:
        program(tmp_path / "bin", name, f"echo '{ping}'" if name == "scontrol" else "echo slurm 24.11.5")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    found = doctor.slurm()
    assert found.state is state and found.text.startswith("slurm 24.11.5, ") and clause in found.text
    (tmp_path / "bin" / "sacct").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = doctor.slurm()
    assert found.state is State.absent and "no sacct" in found.text


def test_a_driver_whose_devices_torch_does_not_see_is_missing(monkeypatch, tmp_path):
    program(tmp_path / "bin", "nvidia-smi", "echo 'GPU 0: H100 (UUID: x)'; echo 'GPU 1: H100 (UUID: y)'")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    from llada_megatron.runtime import device

    monkeypatch.setattr(device, "names", lambda: {})
    found = doctor.cuda()
    assert found.state is State.missing and "the driver shows 2 devices, torch none" in found.text
