"""Figures by layer: what they say against plain sums of one process, and the same under every layout."""

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.training.runs import TWO, comparable, configure, records, train

WATCHED = "training.figures_every_steps=1"
LISTS = (
    "grad_norm_by_layer",
    "weight_norm_by_layer",
    "activation_rms_by_layer",
    "router_entropy_by_layer",
    "router_z_by_layer",
    "dead_experts_by_layer",
    "router_unevenness_by_layer",
)


def part_of(name: str, layers: int) -> int:
    """Where a parameter's figure stands: the embedding, layer 1 to n, the head."""
    if found := re.search(r"decoder\.layers\.(\d+)\.", name):
        return int(found[1]) + 1
    return 0 if "embedding" in name else layers + 1


def plainly(config: Config, favoured: int) -> tuple[dict[str, Any], float, dict[str, Any]]:
    """Figures of a step, its gradient norm, and the same figures from everything that the step touched."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    groups.initialize(config.layout)
    trainer = build_trainer(config, rules.schedule_of(config))
    [chunk] = trainer.model
    layers, seen = config.model.layers, defaultdict(list)
    for router in trainer.balance.routers:
        router.expert_bias[:favoured] = 100.0
        router.register_forward_hook(
            lambda router, given, output: seen[router.layer_number].append(
                (router.gating(given[0].detach()).flatten(0, 1), output[1])
            )
        )
    for index, layer in enumerate(chunk.module.decoder.layers):
        layer.register_forward_hook(
            lambda layer, given, output, index=index: seen["rows", index + 1].append(output[0].detach())
        )
    chunk.module.output_layer.register_forward_hook(
        lambda head, given, output: seen["logits"].append(output[0].detach().max())
    )
    weights = {name: p.detach().clone() for name, p in chunk.module.named_parameters()}
    result = train_step(trainer, 0)
    expected: dict[str, list[float]] = {name: [0.0] * (layers + 2) for name in LISTS}
    for name, parameter in chunk.module.named_parameters():
        at = part_of(name, layers)
        expected["grad_norm_by_layer"][at] += float(parameter.main_grad.double().square().sum())
        expected["weight_norm_by_layer"][at] += float(weights[name].double().square().sum())
    for name in LISTS[:2]:
        expected[name] = [value**0.5 for value in expected[name]]
    for at in range(1, layers + 1):
        rows = torch.cat([part.flatten() for part in seen["rows", at]]).double()
        expected["activation_rms_by_layer"][at] = float(rows.square().mean().sqrt())
        if at in seen:
            logits = torch.cat([logits for logits, _ in seen[at]]).double()
            p = logits.sigmoid() / logits.sigmoid().sum(dim=1, keepdim=True)
            expected["router_entropy_by_layer"][at] = float(-(p * p.log()).sum(dim=1).mean())
            expected["router_z_by_layer"][at] = float(logits.exp().sum(dim=1).log().square().mean())
            chosen = torch.cat([chosen for _, chosen in seen[at]])
            expected["dead_experts_by_layer"][at] = int((~chosen.any(dim=0)).sum())
    return result.watched, result.grad_norm, {**expected, "largest_logit": float(max(seen["logits"]))}


def test_figures_are_plain_sums_over_the_global_batch(corpus, tmp_path):
    config = configure(corpus, tmp_path, WATCHED, "optimizer.clip_grad=0", "model.head_chunk_tokens=16")
    [(watched, grad_norm, expected)] = run_ranks(plainly, config, 4)
    assert watched.keys() == expected.keys()
    for name in LISTS:
        assert numbers(watched[name]) == pytest.approx(expected[name], rel=1e-6), name
    assert watched["largest_logit"] == expected["largest_logit"]
    assert sum(value**2 for value in watched["grad_norm_by_layer"]) ** 0.5 == pytest.approx(
        grad_norm, rel=1e-6
    )
    absent = [None, *[None] * config.model.dense_layers]  # the embedding, layers without experts
    dead = config.model.experts - 4
    assert watched["dead_experts_by_layer"] == [*absent, dead, dead, dead, None]
    assert watched["activation_rms_by_layer"][0] is watched["activation_rms_by_layer"][-1] is None


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    train(configure(corpus, run_dir, WATCHED))
    return run_dir


def numbers(figures: list[float | None]) -> list[float]:
    return [0.0 if value is None else value for value in figures]


def assert_same_figures(run_dir: Path, straight: Path) -> None:
    assert len(records(run_dir)) == len(records(straight)) > 0
    for mine, theirs in zip(records(run_dir), records(straight), strict=True):
        for name in LISTS:
            assert [value is None for value in mine[name]] == [value is None for value in theirs[name]]
            assert numbers(mine[name]) == pytest.approx(numbers(theirs[name]), rel=2e-5), name
        assert mine["dead_experts_by_layer"] == theirs["dead_experts_by_layer"]
        assert mine["largest_logit"] == pytest.approx(theirs["largest_logit"], rel=1e-5)


LAYOUTS = [
    pytest.param(["layout.tp=2"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(["layout.ep=2"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(["layout.pp=2"], marks=[pytest.mark.slow, pytest.mark.full]),
    pytest.param(["layout.cp=2"], marks=pytest.mark.slow),
    pytest.param(["layout.pp=2", "layout.vpp=2", "layout.recompute=full"], marks=pytest.mark.slow),
    pytest.param(["layout.tp=2", "layout.ep=2", "layout.micro_batch=2"], marks=pytest.mark.slow),
    pytest.param(
        ["layout.overlap_grad_reduce=true", "layout.overlap_param_gather=true"], marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_no_layout_changes_the_figures(corpus, straight, tmp_path, layout):
    train(configure(corpus, tmp_path, WATCHED, TWO, *layout))
    assert_same_figures(tmp_path, straight)


OPTIONS = {
    "bf16": ["precision=bf16"],
    "adapters": ["model.lora.rank=4", "model.lora.targets=[attention]"],
    "frozen": ["training.freeze=['*.router.*','embedding.*']"],
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_the_squares_of_what_is_trained_add_up_to_the_gradients_norm(corpus, tmp_path, option):
    train(configure(corpus, tmp_path, WATCHED, TWO, "training.steps=2", *OPTIONS[option]))
    for record in records(tmp_path):
        norms = record["grad_norm_by_layer"]
        assert sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(record["grad_norm"], rel=1e-5)
        assert (norms[0] == 0) == (option != "bf16")
        assert (record["weight_norm_by_layer"][0] == 0) == (option != "bf16")


@pytest.mark.slow
def test_a_tied_head_counts_once(corpus, tmp_path):
    tied = [WATCHED, "model.tied_head=true"]
    train(configure(corpus, tmp_path / "one", *tied))
    train(configure(corpus, tmp_path / "two", *tied, TWO, "layout.pp=2"))
    assert_same_figures(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_watching_every_other_step_changes_nothing_else(corpus, straight, tmp_path):
    train(configure(corpus, tmp_path, "training.figures_every_steps=2"))
    watched = {*LISTS, "largest_logit"}
    for mine, theirs in zip(comparable(tmp_path), comparable(straight), strict=True):
        assert watched & mine.keys() == (watched if mine["step"] % 2 == 0 else set())
        assert mine == {name: value for name, value in theirs.items() if name in mine}
