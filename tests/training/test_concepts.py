"""The family dlcm in training: one model in every layout, and the parser over the global batch."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.schema import Config
from llada_megatron.model.concepts import parser_loss
from llada_megatron.training.expert_rows import ExpertRows
from llada_megatron.verify.comparison import compare
from llada_megatron.verify.layouts import measure_in_processes
from tests.distributed import run_ranks
from tests.training.runs import train

STEPS = 3
LAYOUTS = {
    "DP2": dict(processes=2),
    "DP2 in fours": dict(processes=2, micro_batch=4),
    "TP2": dict(processes=2, tp=2, micro_batch=4),
    "EP2": dict(processes=2, ep=2, micro_batch=2),
    "TP2 EP2": dict(processes=2, tp=2, ep=2),
    "TP2 EP2 recompute": dict(processes=2, tp=2, ep=2, micro_batch=4, recompute="full"),
    "EP2 overlap": dict(processes=2, ep=2, overlap_grad_reduce=True, overlap_param_gather=True),
}


def concepts(corpus: str, *overrides: str, **layout: Any) -> Config:
    return compose(
        [
            *(
                "experiment=dlcm_parity",
                f"data.path=[{corpus}]",
                "data.split='8,2'",
                "data.sequence_length=64",
            ),
            f"schedule.stages=[{{name: c, objective: concepts, block_size: '1', tokens: {STEPS * 512}}}]",
            *("optimizer.warmup_tokens=512", "evaluation.block_sizes=['1']", "evaluation.sequences=4"),
            "training.threads=1",
            *[f"layout.{name}={value}" for name, value in layout.items()],
            *overrides,
        ]
    )


@pytest.mark.parametrize(
    "grad", [pytest.param("none", marks=pytest.mark.slow), pytest.param("ste", marks=pytest.mark.full)]
)
def test_every_layout_and_micro_batch_trains_the_same_model(corpus: str, grad: str) -> None:
    form = f"model.concepts.boundary_grad={grad}"
    singles = [concepts(corpus, form, micro_batch=size) for size in (8, 1, 4)]
    singles.append(concepts(corpus, form, "layout.recompute=full", micro_batch=2))
    [reference] = measure_in_processes(singles[:1], None)
    several = [concepts(corpus, form, **layout) for layout in LAYOUTS.values()]
    names = ["in ones", "in fours", "recompute", *LAYOUTS]
    measured = measure_in_processes(singles[1:], reference) + measure_in_processes(several, reference)
    for name, each in zip(names, measured, strict=True):
        assert compare(name, 2, each, reference).failed() == [], name


def figures(configs: list[Config]) -> list[tuple[float, dict[str, Any]]]:
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    found = []
    for config in configs:
        groups.initialize(config.layout)
        trainer = build_trainer(config, rules.check(config))
        result = train_step(trainer, 0)
        found.append((result.loss, result.figures))
        groups.destroy()
    return found


def test_the_parsers_loss_is_that_of_the_global_batch(corpus: str) -> None:
    """Of micro-batches of one sequence whose rates differ, beside a loss without it."""
    R = 1.5  # far from the rate of a model that has learnt nothing
    with_parser, without = (
        concepts(corpus, f"model.concepts.parser_weight={weight}", f"model.concepts.tokens_per_concept={R}")
        for weight in (10, 0)
    )
    [[(loss, shown), (plain, _)]] = run_ranks(figures, [with_parser, without])
    expected = 10 * parser_loss(shown["boundary_rate"], shown["boundary_probability"], R)
    assert abs(expected) > 0.1 and loss - plain == pytest.approx(expected, rel=1e-5)
    assert shown["tokens_per_concept"] == pytest.approx(1 / shown["boundary_rate"])


def watched(configs: list[Config]) -> list[tuple[float, dict[str, Any]]]:
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    found = []
    for config in configs:
        groups.initialize(config.layout)
        result = train_step(build_trainer(config, rules.check(config)), 0)
        found.append((result.grad_norm, result.watched))
        groups.destroy()
    return found


def assert_same_figures(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("grad_norm", "weight_norm", "activation_rms", "router_entropy", "router_z"):
        one, other = mine[f"{name}_by_layer"], theirs[f"{name}_by_layer"]
        assert [value is None for value in one] == [value is None for value in other], name
        assert [value or 0.0 for value in one] == pytest.approx(
            [value or 0.0 for value in other], rel=2e-5
        ), name
    assert mine["dead_experts_by_layer"] == theirs["dead_experts_by_layer"]


def test_figures_by_layer_tell_the_three_stacks_apart_and_count_no_padding(corpus: str) -> None:
    """Micro-batches of one sequence pad the backbone's rows where those of eight do not."""
    configs = [concepts(corpus, "training.figures_every_steps=1", micro_batch=size) for size in (1, 8)]
    parts = formulas_of(configs[0].model).watched(configs[0].model).parts
    assert parts == [
        *("embedding", "encoder 1", "boundaries", "backbone 1", "backbone 2", "concept attention"),
        *("decoder 1", "head"),
    ]
    [[(grad_norm, ones), (_, eight)]] = run_ranks(watched, configs)
    assert_same_figures(ones, eight)
    norms = ones["grad_norm_by_layer"]
    assert all(norms) and sum(norm**2 for norm in norms) ** 0.5 == pytest.approx(grad_norm, rel=1e-5)
    are_layers = [part[-1].isdigit() for part in parts]
    assert [value is not None for value in ones["activation_rms_by_layer"]] == are_layers
    assert [value is not None for value in ones["router_z_by_layer"]] == [
        part == "backbone 2" for part in parts
    ]


@pytest.mark.slow
def test_no_layout_changes_the_figures_by_layer(corpus: str) -> None:
    every = "training.figures_every_steps=1"
    [[(_, one)]] = run_ranks(watched, [concepts(corpus, every, micro_batch=8)])
    split = concepts(corpus, every, processes=2, tp=2, ep=2, recompute="full")
    for [(_, mine)] in run_ranks(watched, [split], processes=2):
        assert_same_figures(mine, one)


@pytest.mark.slow
def test_a_run_says_how_long_concepts_are_by_corpus(corpus: str, tmp_path: Path) -> None:
    """The same of two ranks, which evaluate other sequences."""
    second = tmp_path / "again"
    for suffix in (".bin", ".idx", ".json"):
        if Path(corpus + suffix).is_file():
            shutil.copy(corpus + suffix, f"{second}{suffix}")
    found = []
    for processes in (1, 2):
        directory = tmp_path / str(processes)
        given = [f"data.path=[{corpus},{second}]", f"run.dir={directory}", f"run.name=p{processes}"]
        train(concepts(corpus, *given, processes=processes))
        (record,) = map(json.loads, (directory / "evaluations.jsonl").read_text().splitlines())
        found.append(record["held_out"])
        assert record["ar"]["nll"] > 0 and record["bound"] == {}
    assert len(found[0]) == 3 and found[0].keys() == found[1].keys()
    for name, one in found[0].items():
        assert one["mean"] == pytest.approx(found[1][name]["mean"]) and one["mean"] >= 1


def test_the_experts_of_a_backbone_expect_a_row_for_every_concept() -> None:
    sizes = dict(seq_length=64, micro_batch_size=2)
    config = concepts("corpus", "model.concepts.tokens_per_concept=4")
    plain = replace(config, model=replace(config.model, family="gpt"))
    assert ExpertRows(config, []).mean(sizes) == ExpertRows(plain, []).mean(sizes) / 4


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("layout.pp=2", "layout.pp=2 sends tensors of one shape"),
        ("layout.cp=2", "layout.cp=2 deals a sequence's tokens"),
        ("model.lora.rank=4", "model.lora.rank is set"),
        ("model.tied_head=true", "model.tied_head is set"),
        ("model.core=hybrid", "model.family=dlcm needs gpt"),
        ("model.concepts.kv_heads=3", "model.concepts.heads=4 is not a multiple"),
        ("model.concepts.encoder_layers=3", "leave some to the backbone"),
        ("model.dense_layers=1", "experts are the backbone's"),
        ("model.family=gpt", "objective=concepts is what the family dlcm learns"),
        ("schedule.stages.0.objective=autoregressive", "set it to concepts"),
        ("model.router.rows_cap=2", "model.router.rows_cap is set"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(tmp_path: Path, override: str, said: str) -> None:
    processes = ["layout.processes=2"] if override.startswith("layout") else []
    with pytest.raises(BadInput, match=said) as refused:
        rules.check(concepts("corpus", override, *processes))
    assert str(refused.value).count(". ") == 0


def test_concepts_of_another_family_are_refused_and_not_ignored(tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"concepts\.mup_base_hidden_size=32 means nothing with model\.family=gpt"
    ):
        rules.check(compose(["experiment=parity", "model.concepts.mup_base_hidden_size=32"]))


def test_replicated_concepts_must_be_finished() -> None:
    config = concepts(
        "corpus", "model.concepts.attention=replicated", "model.concepts.concept=boundary_token"
    )
    with pytest.raises(BadInput, match=r"needs model\.concepts\.concept=mean"):
        rules.check(config)
