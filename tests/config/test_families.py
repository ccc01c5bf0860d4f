"""model.family chooses whose rules, formulas and stage builder are asked."""

import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest

from llada_megatron.config import families, rules
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import gpt, require_masks
from llada_megatron.config.flops import training_flops_per_sequence
from llada_megatron.config.layout_rules import require
from llada_megatron.config.parameters import total_parameters
from llada_megatron.config.schema import Config
from llada_megatron.plan.planner import Planner


def of_family(name: str) -> Config:
    config = compose(["experiment=llada2_mini_cpt", "cluster=h100_64"])
    return replace(config, model=replace(config.model, family=name))


class Doubled:
    """Twice the weights of `gpt`."""

    FILLS_MASKS = False
    check = staticmethod(gpt.check)
    check_layout = staticmethod(gpt.check_layout)
    coarse = staticmethod(gpt.coarse)
    stage_contents = staticmethod(gpt.stage_contents)
    pair_flops = staticmethod(gpt.pair_flops)
    last_layer_weights = staticmethod(gpt.last_layer_weights)
    kept_numbers = staticmethod(gpt.kept_numbers)
    active_adapters = staticmethod(gpt.active_adapters)

    @staticmethod
    def check_run(config, schedule):
        require(not config.evaluation.infill_sequences, "doubled needs evaluation.infill_sequences=0.")

    @staticmethod
    def parameters(model, contents, **ways):
        one = gpt.parameters(model, contents, **ways)
        return replace(one, sharded=2 * one.sharded)

    @staticmethod
    def active_weights(model):
        return {module: 2 * weights for module, weights in gpt.active_weights(model).items()}


def test_an_unknown_family_is_refused_with_the_list() -> None:
    with pytest.raises(BadInput, match=r"model.family=nonesuch is unknown: choose from gpt, dlcm\."):
        rules.check(of_family("nonesuch"))


def test_a_family_says_what_it_does_not_serve(monkeypatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "doubled", Doubled())
    doubled = of_family("doubled")
    filling = replace(doubled, evaluation=replace(doubled.evaluation, infill_sequences=8))
    rules.check(replace(filling, model=of_family("gpt").model))
    with pytest.raises(BadInput, match="doubled needs evaluation"):
        rules.check(filling)
    require_masks(of_family("gpt").model, "A bound")
    with pytest.raises(BadInput, match="A bound fills masks, and the model is of the family doubled"):
        require_masks(doubled.model, "A bound")


def test_a_family_is_counted_by_its_own_formulas(monkeypatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "doubled", Doubled())
    doubled, plain = of_family("doubled").model, of_family("gpt").model
    assert total_parameters(doubled) > total_parameters(plain)
    size = dict(positions=64, pairs=0.0, supervised=0.0)
    assert training_flops_per_sequence(doubled, **size) == 2 * training_flops_per_sequence(plain, **size)


def test_a_family_without_formulas_of_its_memory_and_time_is_not_planned(monkeypatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "doubled", Doubled())
    rules.check(of_family("doubled"))  # it can be trained
    with pytest.raises(BadInput, match=r"no formula for what model\.family=doubled keeps"):
        Planner(of_family("doubled"))


def test_a_stage_is_built_by_the_module_of_the_familys_name(monkeypatch) -> None:
    from llada_megatron.model.provider import build_stage

    module = ModuleType("doubled")
    module.build_stage = lambda config, **chosen: SimpleNamespace(built=config.model.family, **chosen)
    monkeypatch.setitem(families.FAMILIES, "doubled", Doubled())
    monkeypatch.setitem(sys.modules, "llada_megatron.model.families.doubled", module)
    stage = build_stage(of_family("doubled"), vp_stage=1, initialize=False)
    assert (stage.built, stage.vp_stage, stage.initialize) == ("doubled", 1, False)
    with pytest.raises(BadInput, match="is unknown"):
        build_stage(of_family("nonesuch"))
