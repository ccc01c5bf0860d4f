"""A real pretrained model's way into the project: the numbers stay those of its file, and the demo runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llada_megatron.cli import main
from llada_megatron.commands.demo import run_step
from llada_megatron.config.compose import compose
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.data.packed import build_sequences
from llada_megatron.data.python_text import write_python_text
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.demo import pretrained
from llada_megatron.parallel import groups
from tests.demo.gguf_reference import Smollm2
from tests.packages import SMOLLM2 as FOLDER

ROOT = Path(__file__).parents[2]


@pytest.fixture
def packages(monkeypatch) -> None:
    if not (FOLDER / pretrained.PACKAGE).is_dir():
        pytest.skip("needs the packages that `make test-slow` installs")
    monkeypatch.syspath_prepend(str(FOLDER))


def test_without_the_package_the_demo_says_what_to_do(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != FOLDER])
    assert main(["demo", "--experiment", "demo_smollm2", "--short"]) == 2
    assert "run `make demo-smollm2`" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("packages")
def test_both_checkpoints_have_the_nll_that_plain_pytorch_computes_from_the_file(tmp_path: Path) -> None:
    config = compose(
        [
            "experiment=demo_smollm2",
            f"data.tokenizer={tmp_path}/hf/tokenizer.json",
            f"data.path=[{tmp_path}/text]",
            f"checkpoint.init_from={tmp_path}/moe",
            "evaluation.sequences=3",
        ]
    )
    write_python_text(tmp_path / "text.jsonl")
    for step in [*pretrained.conversion(config), pretrained.preparation(config, tmp_path / "text.jsonl")]:
        run_step(step)
    groups.initialize(LayoutConfig(), threads=2)
    try:
        dense, moe = (pretrained.autoregressive_nll(config, tmp_path / name) for name in ("dense", "moe"))
    finally:
        groups.destroy()
    held_out = build_sequences(
        config.data,
        split="validation",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=16,
    )
    reference, total, predicted = Smollm2(pretrained.gguf_file()), 0.0, 0
    for sample in (held_out[index] for index in range(3)):
        document = np.searchsorted(sample.cu_seqlens, np.arange(len(sample.tokens)), side="right")
        nll, count = reference.nll_sum(torch.from_numpy(sample.tokens), torch.from_numpy(document))
        total, predicted = total + nll, predicted + count
    expected = total / predicted
    assert expected < 4.0  # of a model that has read English; a wrong rotation gives more than 5
    assert dense == pytest.approx(expected, abs=1e-4)
    assert moe == pytest.approx(dense, rel=1e-5)

    tokenizer = load_tokenizer(f"{tmp_path}/hf/tokenizer.json")
    assert tokenizer.encode("The year 1234")[-4:] == [tokenizer.encode(digit)[0] for digit in "1234"]
    text = "def f(x):\n    return x  # größer, 数\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.full
@pytest.mark.usefixtures("packages")
def test_the_short_demo_runs_every_stage_and_learns(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{FOLDER}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "llada_megatron", "demo", "--experiment", "demo_smollm2", "--short"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "demo_smollm2_short"
    report = json.loads((run / "report.json").read_text())
    stages = compose(["experiment=demo_smollm2"]).schedule.stages
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [stage["name"] for stage in report["stages"]][-len(stages) :] == [s.name for s in stages]
    first, last = (evaluation["bound"] for evaluation in (evaluations[0], evaluations[-1]))
    assert first["1"]["mean"] > math.log(49152) > last["1"]["mean"]  # from worse than uniform
    assert last["32"]["mean"] < first["32"]["mean"]
    assert (run / "samples.jsonl").read_text()
