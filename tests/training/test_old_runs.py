"""A run that earlier code wrote (tests/old_run/README.md) is read, evaluated and continued by today's."""

import json
import os
import platform
import shutil
from pathlib import Path

import pytest
import torch

from llada_megatron import cli
from llada_megatron.config import compose
from tests.distributed import run_ranks

OLD = Path(__file__).parents[1] / "old_run"
RECORDED = json.loads((OLD / "continued.json").read_text())
BLOCKS = ("1", "4", "32")
ANOTHER_PROCESSOR = 1e-6
"""Relative, in fp32: another processor's kernels add in another order."""


@pytest.fixture
def folder(tmp_path) -> Path:
    shutil.copytree(OLD, tmp_path / "old")
    return tmp_path / "old"


def records(folder: Path, file: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / f"{file}.jsonl").read_text().splitlines()]


def processor() -> list[str]:
    """What decides the last bits of a sum on a CPU."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return [name, torch.backends.cpu.get_cpu_capability(), torch.__version__]


def equal(recorded: list[float]) -> object:
    """To compare with: equal to the last bit on the processor that wrote the fixture."""
    same = processor() == RECORDED["processor"]
    return recorded if same else pytest.approx(recorded, rel=ANOTHER_PROCESSOR)


def go_on(folder: Path) -> tuple[int, bool]:
    from llada_megatron.training import loop

    os.chdir(folder)  # the old settings name paths in it
    config = compose.load("run/config.yaml")
    config.training.steps = 0  # the schedule's end
    outcome = loop.run(config)
    return outcome.step, outcome.finished


def test_an_old_run_goes_on_as_the_code_that_wrote_it_would_have(folder):
    assert run_ranks(go_on, folder) == [(6, True)]
    metrics, evaluations = records(folder, "metrics"), records(folder, "evaluations")
    assert [record["step"] for record in metrics] == list(range(6))
    assert [record["loss"] for record in metrics[3:]] == equal(RECORDED["losses"])
    assert [record["grad_norm"] for record in metrics[3:]] == equal(RECORDED["grad_norms"])
    for evaluation, recorded in zip(evaluations[2:], RECORDED["bounds"], strict=True):
        bound = {size: evaluation["bound"][size]["mean"] for size in BLOCKS}
        assert list(bound.values()) == equal([recorded[size] for size in BLOCKS])


def test_the_checkpoint_of_an_old_run_is_evaluated_alike(folder, tmp_path):
    checkpoint, data = str(folder / "run"), f"data.path=[{folder}/corpus/text]"
    assert cli.main(["evaluate", checkpoint, data, "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["bound"]
    recorded = records(folder, "evaluations")[-1]["bound"]
    assert [found[size]["mean"] for size in BLOCKS] == equal([recorded[size]["mean"] for size in BLOCKS])


def test_verbs_that_read_runs_read_an_old_one(folder, capsys):
    run = folder / "run"

    def said(*arguments: str) -> str:
        assert cli.main([*arguments, str(run)]) == 0
        return capsys.readouterr().out

    assert "bdlm_4" in said("status")
    listed = said("checkpoint", "list")
    assert "step_00000003" in listed and "5.5278" in listed  # the manifest's bound at block 4
    assert "is whole" in said("checkpoint", "verify")
    assert "6.28" in said("report")  # the last stage's loss
    report = json.loads((run / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["ar", "bdlm_4", "mdlm"]
    assert report["stages"][1]["bound"]["4"]["mean"] == pytest.approx(5.5278, abs=1e-4)
