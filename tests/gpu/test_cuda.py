"""What a machine with a CUDA device should show; skipped elsewhere. `make test-gpu` runs it."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.gpu.parity import STEPS, STORED, corpus, llada, losses

gpu = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"
LOSS_TOLERANCE = 1e-4
"""Relative, fp32 against fp32: other kernels, other orders of summation."""
BF16_TOLERANCE = 0.02


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def stored():
    return json.loads(STORED.read_text())


@pytest.mark.slow
def test_the_stored_losses_are_those_of_a_cpu(numbers, stored, tmp_path):
    found = losses(numbers, tmp_path / "run", "model.layer_spec=local", cuda=False)
    assert len(stored) == STEPS and found == pytest.approx(stored, rel=LOSS_TOLERANCE / 10)


@gpu
@pytest.mark.parametrize("layer_spec", ["local", "transformer_engine"])
def test_losses_of_20_steps_equal_those_of_a_cpu(numbers, stored, tmp_path, layer_spec):
    if layer_spec == "transformer_engine":
        pytest.importorskip("transformer_engine.pytorch")
    found = losses(numbers, tmp_path / "run", f"model.layer_spec={layer_spec}")
    assert found == pytest.approx(stored, rel=LOSS_TOLERANCE)


@gpu
def test_losses_in_bf16_follow_those_of_a_cpu(numbers, stored, tmp_path):
    found = losses(numbers, tmp_path / "run", "precision=bf16")
    assert found == pytest.approx(stored, rel=BF16_TOLERANCE)


@gpu
def test_golden_outputs_of_the_public_code_hold():
    llada("verify", "golden", str(GOLDEN))


def test_transformer_engine_trains_in_bf16_from_a_checkpoint_written_on_a_cpu(numbers, tmp_path):
    pytest.importorskip("transformer_engine.pytorch")
    few = "training.steps=4"
    before = losses(numbers, tmp_path / "cpu", few, cuda=False)
    engine = ["precision=bf16", "model.layer_spec=transformer_engine"]
    after = losses(numbers, tmp_path / "te", few, *engine, f"checkpoint.init_from={tmp_path}/cpu")
    assert after[0] < before[0]


@gpu
def test_the_attention_benchmark_finds_every_executor_right_and_transformer_engine_among_the_baselines(
    tmp_path,
):
    llada("bench", "attention", "--suite", "quick", "--out", str(tmp_path))
    results = json.loads((tmp_path / "attention.json").read_text())["results"]
    assert all(result["correct"] for result in results)
    if importlib.util.find_spec("transformer_engine"):
        of_baseline = [result for result in results if result["executor"] == "TE unfused"]
        assert of_baseline and all(result["seconds"] and result["peak_bytes"] for result in of_baseline)


@gpu
def test_a_save_copies_into_pinned_memory_that_the_next_one_uses_again():
    import torch

    from llada_megatron.checkpoint.staging import Staging

    staging = Staging()
    values = [torch.arange(1000, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    first = staging.copies(values)
    assert all(copy.is_pinned() and copy.equal(each.cpu()) for copy, each in zip(first, values, strict=True))
    assert [copy.data_ptr() for copy in staging.copies(values)] == [copy.data_ptr() for copy in first]
