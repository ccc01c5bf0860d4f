"""A micro-batch under torch's own watch for synchronisation; on a CPU: tests/training/test_waiting.py."""

import pytest

from tests.distributed import run_ranks

pytestmark = pytest.mark.gpu


def one_micro_batch(overrides: list[str]) -> list[float]:
    """In a forked process: losses of two micro-batches, the second one where nothing may wait."""
    import torch

    from llada_megatron.config import rules
    from llada_megatron.config.compose import compose
    from llada_megatron.model.provider import build_model
    from llada_megatron.objectives import passes
    from llada_megatron.objectives.registry import objective_of
    from llada_megatron.parallel import groups
    from llada_megatron.runtime import device
    from tests.training.test_waiting import Sequences, attends

    config = compose(["experiment=parity", *overrides])
    schedule = rules.schedule_of(config)
    groups.initialize(config.layout)
    (model,) = build_model(config, attention=attends)
    objective = objective_of("diffusion", config, schedule)
    batches = [
        objective.batch(Sequences(), [index], schedule.stages[0], noise_sigma=0.5).packed()
        for index in range(2)
    ]
    losses = []
    for number, batch in enumerate(batches):  # the first one compiles and allocates, which may wait
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        output, loss_of = passes.forward_step(objective, None, iter([batch.to(device.device())]), model)
        loss, _, _ = loss_of(output)
        loss.backward()
        torch.cuda.set_sync_debug_mode("default")
        losses.append(float(loss))
    groups.destroy()
    return losses


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_nothing_of_a_micro_batch_waits_for_the_device(recompute):
    dense = ["model.experts=0", "model.dense_layers=2", "model.layers=2", "data.sequence_length=64"]
    losses = run_ranks(one_micro_batch, [*dense, f"layout.recompute={recompute}"])[0]
    assert all(loss > 0 for loss in losses)
