"""The plan of the family dlcm: parts, concepts by their rate, and passes before a step's own."""

from dataclasses import replace
from typing import Any

import pytest

from llada_megatron.config import rules
from llada_megatron.config.choices import ConceptAttention
from llada_megatron.config.families.dlcm import tokens_of
from llada_megatron.config.families.gpt import active_weights
from llada_megatron.config.schema import Config
from llada_megatron.plan.assumptions import of_switches
from llada_megatron.plan.estimate import Plan, plan
from llada_megatron.plan.planner import Planner
from llada_megatron.plan.search import Search
from tests.plan.flash import composed, config_with


def config(*overrides: str, **concepts: Any) -> Config:
    found = composed("experiment=dlcm_2b_pretrain", *overrides)
    concepts = replace(found.model.concepts, **concepts)
    return replace(found, model=replace(found.model, concepts=concepts))


def planned(config: Config) -> Plan:
    return plan(Planner(config), config.layout, rules.check(config))


def test_a_plan_names_the_memory_of_every_part_of_the_model() -> None:
    parts = planned(config()).fullest.activations
    assert parts.keys() == {
        *("embedding", "encoder", "detector", "pooling", "backbone", "smoothing", "concept_attn"),
        *("decoder", "head"),
    }


def test_half_as_many_concepts_are_half_of_the_backbone_s_memory() -> None:
    four, eight = planned(config()), planned(config(tokens_per_concept=8.0))
    for part in ("backbone", "smoothing"):
        assert eight.fullest.activations[part] == four.fullest.activations[part] // 2
    assert eight.fullest.activations["encoder"] == four.fullest.activations["encoder"]
    assert eight.stages[0].step_seconds < four.stages[0].step_seconds


def test_a_plan_says_how_many_concepts_it_takes_for_granted() -> None:
    of_eight = config(tokens_per_concept=8.0)
    (stage,) = planned(of_eight).stages
    assert any("one token in 8 opens a concept" in clause for clause in of_switches(of_eight, stage))


def test_replicated_concepts_keep_and_take_more() -> None:
    ragged, replicated = planned(config()), planned(config(attention=ConceptAttention.replicated))
    part = "concept_attn"
    assert replicated.fullest.activations[part] > 2 * ragged.fullest.activations[part]
    assert replicated.stages[0].step_seconds > ragged.stages[0].step_seconds


def test_the_device_waits_for_the_host_once_in_each_of_the_step_s_own_forwards(capsys) -> None:
    from llada_megatron.plan.report import print_plan

    given, (stage,) = config(), (several := planned(config())).stages
    tokens = given.layout.global_batch * 8192 / given.layout.processes
    assert stage.seconds["boundaries"] == pytest.approx(60e-9 * tokens)
    replicated = planned(config(attention=ConceptAttention.replicated)).stages[0]
    assert replicated.seconds["boundaries"] == pytest.approx(150e-9 * tokens)
    print_plan(several, given)
    said = " ".join(capsys.readouterr().out.split())
    assert "the device waits for the host" in said and "60 ns a token" in said


def test_with_several_micro_batches_the_encoder_runs_once_more_and_with_one_it_does_not() -> None:
    several, one = planned(config()), planned(config_with(config(), global_batch=256))
    (of_several,), (of_one,) = several.stages, one.stages
    assert (of_several.passes_before, of_one.passes_before) == (1, 0)
    model, length = config().model, 8192
    encoder = tokens_of(model, model.concepts.encoder_layers)
    weights = sum(active_weights(encoder).values()) + 2 * model.hidden_size**2
    pairs = 4 * encoder.heads * encoder.head_dim * encoder.layers * (length + 1) / 2
    more = of_several.performed_flops_per_token - of_one.performed_flops_per_token
    assert more == pytest.approx(2 * weights + pairs, rel=1e-3)
    assert of_several.model_flops_per_token == of_one.model_flops_per_token
    assert of_several.seconds["before"] > 0 and "before" not in of_one.seconds


def test_an_encoder_s_pass_sends_what_the_encoder_sends_and_the_parser_two_numbers() -> None:
    config = composed("experiment=dlcm_parity", "layout.processes=4", "layout.tp=2")
    planner, (stage,) = Planner(config), rules.check(config).stages
    placement, (shape, _) = planner.place(config.layout), planner.sizes(config.layout, stage)

    def sent(passes_before: int) -> dict[str, float]:
        given = planner.model, shape, config.layout, placement.held[0], placement.contents[0], 4
        found: dict[str, float] = {}
        for calls, message in planner.formulas.of_rank(*given, b=4, passes_before=passes_before):
            key = f"{message.group} {message.operation}"
            found[key] = found.get(key, 0.0) + calls * message.payload
        return found

    once, more = sent(0), sent(1)
    hidden = 4 * shape.rows * config.model.hidden_size  # bytes of a micro-batch
    added = {name: more[name] - once[name] for name in more if more[name] != once[name]}
    # a layer gathers and scatters twice; the embedding scatters; the boundaries' h is gathered
    assert added == {"tp all_gather": 4 * 3 * hidden, "tp reduce_scatter": 4 * 3 * hidden}
    assert once["dp all_reduce"] == 16


def test_a_search_leaves_pipelines_and_context_parallelism_out_and_says_why() -> None:
    found = Search(Planner(config())).run()
    assert found.candidates
    assert {(one.layout.pp, one.layout.cp) for one in found.candidates} == {(1, 1)}
    assert any(reason.startswith("layout.pp sends tensors of one shape") for reason in found.rejections)


def test_switches_that_the_family_refuses_are_not_offered() -> None:
    offered = {name for each in planned(config()).effects for name in each.overrides}
    assert "precision.gradients=bf16" in offered
    assert not {name for name in offered if "overlap_tensor_parallel" in name or "cuda_graphs" in name}
