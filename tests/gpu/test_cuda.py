"""What a machine with a CUDA device should show; skipped elsewhere. `make test-gpu` runs it."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"
LOSS_TOLERANCE = 1e-4
"""Relative, fp32 against fp32: other kernels, other orders of summation."""


def llada(*arguments: str, cuda: bool = True) -> None:
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    subprocess.run([sys.executable, "-m", "llada_megatron", *arguments], env=environment, check=True)


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    llada("data", "python-text", "--output", str(directory), cuda=False)
    return directory / "python"


def test_golden_outputs_of_the_public_code_hold():
    llada("verify", "golden", str(GOLDEN))


def test_losses_equal_those_of_the_cpu(corpus, tmp_path):
    common = ["train", "experiment=parity", f"data.path=[{corpus}]", "model.layer_spec=local"]
    llada(*common, f"run.dir={tmp_path}/cuda")
    llada(*common, f"run.dir={tmp_path}/cpu", cuda=False)
    assert losses(tmp_path / "cuda") == pytest.approx(losses(tmp_path / "cpu"), rel=LOSS_TOLERANCE)


def test_transformer_engine_trains_in_bf16_from_a_checkpoint_written_on_a_cpu(corpus, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    common = ["train", "experiment=parity", f"data.path=[{corpus}]"]
    llada(*common, f"run.dir={tmp_path}/cpu", cuda=False)
    llada(
        *common,
        "precision=bf16",
        "model.layer_spec=transformer_engine",
        f"checkpoint.init_from={tmp_path}/cpu",
        f"run.dir={tmp_path}/te",
    )
    assert losses(tmp_path / "te")[0] < losses(tmp_path / "cpu")[0]


def test_the_attention_benchmark_finds_every_executor_right_and_transformer_engine_among_the_baselines(
    tmp_path,
):
    llada("bench", "attention", "--suite", "quick", "--out", str(tmp_path))
    results = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert all(result["correct"] for result in results)
    if importlib.util.find_spec("transformer_engine"):
        of_baseline = [result for result in results if result["executor"] == "TE unfused"]
        assert of_baseline and all(result["seconds"] and result["peak_bytes"] for result in of_baseline)


def test_a_save_copies_into_pinned_memory_that_the_next_one_uses_again():
    import torch

    from llada_megatron.checkpoint.staging import Staging

    staging = Staging()
    values = [torch.arange(1000, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    first = staging.copies(values)
    assert all(copy.is_pinned() and copy.equal(each.cpu()) for copy, each in zip(first, values, strict=True))
    assert [copy.data_ptr() for copy in staging.copies(values)] == [copy.data_ptr() for copy in first]
