"""The routers' own losses are means over the global batch, whatever the loss divides by, in every layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.training.runs import TWO, assert_equal_within_rounding, configure, records, train

LOSSES = ["model.router.z_loss=0.01", "model.router.sequence_balance=0.02"]
NOISY_ONLY = "model.expert_balance_clean_half=false"


def last_router(configs: list[Config]) -> list[tuple[np.ndarray, ...]]:
    """Of each configuration's first step the last router's gradient, its inputs [sequences, S, H], weight."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    found = []
    for config in configs:
        groups.initialize(config.layout)
        trainer = build_trainer(config, rules.schedule_of(config))
        router, inputs = trainer.rows.routers[-1], []
        router.register_forward_hook(lambda router, given, output, to=inputs: to.append(given[0].detach()))
        weight = router.weight.detach().clone()
        train_step(trainer, 0)
        inputs_BSH = torch.cat([part.transpose(0, 1) for part in inputs])
        found.append(tuple(each.numpy() for each in (router.weight.main_grad, inputs_BSH, weight)))
        groups.destroy()
    return found


def plainly(inputs_BSH: np.ndarray, weight: Any, config: Config, *, noisy_only: bool) -> np.ndarray:
    """The gradient of both losses of a layer, from a global batch's inputs of its router."""
    weight = torch.from_numpy(weight).double().requires_grad_()
    logits_BSE = torch.from_numpy(inputs_BSH).double() @ weight.T
    z = logits_BSE.logsumexp(dim=-1).square().mean()
    counted = logits_BSE[:, : logits_BSE.shape[1] // 2] if noisy_only else logits_BSE
    scores, k, E = counted.sigmoid(), config.model.experts_per_token, config.model.experts
    chosen = torch.zeros_like(scores).scatter_(-1, scores.topk(k, dim=-1).indices, 1.0)
    f_BE = chosen.mean(dim=1) * E / k
    P_BE = (scores / scores.sum(dim=-1, keepdim=True)).mean(dim=1)
    (
        config.model.router.z_loss * z
        + config.model.router.sequence_balance * (f_BE * P_BE).sum(dim=1).mean()
    ).backward()
    return weight.grad.numpy()


CASES = {
    "tokens": [],
    "masked": ["diffusion.denominator=masked", "layout.micro_batch=2"],
    "sequence": ["diffusion.denominator=sequence"],
    "noisy half": [NOISY_ONLY],
    "confidence": [
        "schedule.stages=[{name: cap, objective: confidence, block_size: '4', tokens: 1024}]",
        "layout.micro_batch=4",
    ],
}


@pytest.mark.parametrize(
    "names",
    [["masked"], pytest.param(["tokens", "sequence", "noisy half", "confidence"], marks=pytest.mark.slow)],
    ids="+".join,
)
def test_they_are_means_over_rows_and_sequences_of_the_global_batch(corpus, tmp_path, names):
    plain = [[*CASES[name], "optimizer.clip_grad=0"] for name in names]
    without = [configure(corpus, tmp_path, *options) for options in plain]
    with_losses = [configure(corpus, tmp_path, *options, *LOSSES) for options in plain]
    [results] = run_ranks(last_router, [*without, *with_losses])
    before_them, with_them = results[: len(without)], results[len(without) :]
    for name, (before, _, weight), (after, inputs, _), config in zip(
        names, before_them, with_them, with_losses, strict=True
    ):
        inputs = inputs[-config.layout.global_batch :]  # a pass that counts may have read them before
        expected = plainly(inputs, weight, config, noisy_only=NOISY_ONLY in CASES[name])
        error = np.linalg.norm(after - before - expected) / np.linalg.norm(expected)
        assert error < 1e-3, name


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    train(configure(corpus, run_dir, *LOSSES, "training.figures_every_steps=1"))
    return run_dir


LAYOUTS = [
    pytest.param(["layout.cp=2"], marks=pytest.mark.slow),
    pytest.param(["layout.tp=2", "layout.ep=2", "layout.micro_batch=2"], marks=pytest.mark.slow),
    pytest.param(["layout.pp=2", "layout.vpp=2"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(["layout.ep=2", "layout.recompute=full"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(
        ["layout.recompute=selective", "layout.recompute_modules=[moe]", "layout.micro_batch=2"],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_no_layout_changes_what_they_teach(corpus, straight, tmp_path, layout):
    train(configure(corpus, tmp_path, *LOSSES, "training.figures_every_steps=1", TWO, *layout))
    assert_equal_within_rounding(tmp_path, straight)
    for mine, theirs in zip(records(tmp_path), records(straight), strict=True):
        for name in ("router_z_by_layer", "router_unevenness_by_layer"):
            numbers = [[value or 0.0 for value in each[name]] for each in (mine, theirs)]
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5), name
            assert min(numbers[0][2:-1]) > 0.5  # a perfect balance is 1


@pytest.mark.slow
def test_a_z_loss_lowers_z_and_a_balance_evens_sequences_out(corpus, straight, tmp_path):
    strong = ["model.router.z_loss=1", "model.router.sequence_balance=3", "training.figures_every_steps=1"]
    train(configure(corpus, tmp_path, *strong))
    for name in ("router_z_by_layer", "router_unevenness_by_layer"):
        mine, theirs = (sum(value or 0.0 for value in records(run)[-1][name]) for run in (tmp_path, straight))
        assert mine < theirs, name
