"""Switches that a CPU serves, against a run without them: what they round, and what they leave to the bit."""

import re

import pytest

from tests.training.runs import TWO, checkpoint, comparable, configure, records, train

BF16 = "precision=bf16"
MOMENTS = "precision.moments=bf16"
RELATIVE_LOSS = 2e-3
"""Of bf16 moments or gradients, over 6 steps, beside bf16 weights with fp32 ones."""


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("straight")
    train(configure(corpus, run_dir, BF16))
    return run_dir


def saved_dtypes(folder):
    """Dtypes of the optimizer's tensors in a checkpoint, by kind."""
    from torch.distributed.checkpoint import FileSystemReader

    held = FileSystemReader(folder / "optimizer").read_metadata().state_dict_metadata
    found = {}
    for name, entry in held.items():
        if kind := re.search(r"state\.(exp_avg|exp_avg_sq|param)\.", name):
            found.setdefault(kind[1], set()).add(str(entry.properties.dtype))
    return found


def losses(run_dir):
    return [record["loss"] for record in records(run_dir)]


@pytest.mark.slow
@pytest.mark.parametrize("narrow", [MOMENTS, "precision.gradients=bf16"])
def test_narrow_state_trains_to_nearly_the_same_losses(corpus, tmp_path, straight, narrow):
    train(configure(corpus, tmp_path, BF16, narrow))
    assert losses(tmp_path) == pytest.approx(losses(straight), rel=RELATIVE_LOSS)
    assert losses(tmp_path) != losses(straight)


@pytest.mark.slow
def test_narrow_moments_are_saved_as_they_are_and_a_resume_goes_on_bit_for_bit(corpus, tmp_path):
    whole = configure(corpus, tmp_path / "whole", BF16, MOMENTS)
    train(whole)
    parts = [
        configure(corpus, tmp_path / "parts", BF16, MOMENTS, f"training.steps={steps}", *layout)
        for steps, layout in ((3, []), (0, []))
    ]
    train(parts[0])
    train(parts[1])
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")
    kinds = saved_dtypes(checkpoint(tmp_path / "whole", 6))
    assert kinds == {
        "exp_avg": {"torch.bfloat16"},
        "exp_avg_sq": {"torch.bfloat16"},
        "param": {"torch.float32"},
    }


@pytest.mark.slow
def test_a_shared_expert_beside_the_messages_trains_to_nearly_the_same_losses(corpus, tmp_path):
    layout = [BF16, TWO, "layout.ep=2"]
    train(configure(corpus, tmp_path / "straight", *layout))
    train(configure(corpus, tmp_path / "switched", *layout, "layout.overlap_shared_experts=true"))
    # Gradients of its input are added in another order.
    assert losses(tmp_path / "switched") == pytest.approx(losses(tmp_path / "straight"), rel=RELATIVE_LOSS)
