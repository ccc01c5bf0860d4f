"""A run on a CUDA device that is killed, stopped and resumed: `make test-gpu` runs it."""

import json

import pytest

from tests.gpu.parity import llada

pytestmark = pytest.mark.gpu


def test_a_resumed_run_has_the_bits_of_one_that_was_left_alone(tmp_path):
    """With whichever layers and AdamW a run here takes: TransformerEngine's, where it is installed."""
    file = tmp_path / "resume.json"
    llada("verify", "resume", "experiment=parity", "precision.deterministic=true", "--json", str(file))
    found = json.loads(file.read_text())
    assert found["bitwise"] and found["same_samples"] and found["same_noise"]
