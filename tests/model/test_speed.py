"""model/speed.py: what the switches make of megatron-core's configuration."""

from dataclasses import fields

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput

BEFORE = {
    "moe_token_dispatcher_type": "alltoall",
    "moe_permute_fusion": False,
    "moe_router_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}
"""What a plain layout has besides megatron-core's defaults."""


def changed(config, layer_spec="local"):
    """Fields that differ from a plain layout's, by name."""
    from llada_megatron.model.families.gpt import transformer_config
    from llada_megatron.parallel import groups  # noqa: F401  # the seam comes first

    plain = transformer_config(compose(["experiment=parity"]), layer_spec="local")
    made = transformer_config(config, layer_spec=layer_spec)
    names = [each.name for each in fields(plain) if each.compare and each.init]
    # Functions that megatron-core makes for itself are new each time.
    return {
        name: getattr(made, name)
        for name in names
        if getattr(made, name) != getattr(plain, name) and not callable(getattr(plain, name))
    }


def test_with_every_switch_off_the_configuration_is_megatron_cores_own_but_for_a_plain_layout():
    from megatron.core.transformer.transformer_config import TransformerConfig

    from llada_megatron.model import speed
    from llada_megatron.parallel import groups  # noqa: F401

    options = speed.options(compose(["experiment=parity"]), layer_spec="local")
    defaults = {each.name: each.default for each in fields(TransformerConfig)}
    assert {name: value for name, value in options.items() if value and value != defaults[name]} == {
        "moe_token_dispatcher_type": "alltoall"
    }
    assert changed(compose(["experiment=parity"])) == {}


def test_switches_reach_megatron_core_by_its_names():
    ep2 = ["experiment=parity", "precision=bf16", "layout.processes=2", "layout.ep=2"]
    found = changed(compose([*ep2, "layout.dispatcher=hybridep", "layout.overlap_experts=true"]))
    assert found["moe_token_dispatcher_type"] == "flex"
    assert found["moe_flex_dispatcher_backend"] == "hybridep"
    assert found["overlap_moe_expert_parallel_comm"] is True
    found = changed(compose(["experiment=parity", "layout.offload_modules=[core_attn,attn_proj]"]))
    assert found == {
        "fine_grained_activation_offloading": True,
        "offload_modules": ["core_attn", "attn_proj"],
    }


def test_a_flex_dispatcher_is_refused_without_a_device():
    from llada_megatron.model import speed
    from llada_megatron.parallel import groups  # noqa: F401

    config = compose(["experiment=parity", "layout.dispatcher=deepep"])
    with pytest.raises(BadInput, match=r"needs a CUDA device: set layout.dispatcher=alltoall\."):
        speed.refuse_here(config)


@pytest.mark.parametrize(
    ("overrides", "shared"),
    [
        ([], True),
        (["layout.micro_batch=2"], True),
        (["layout.cp=2", "layout.processes=2"], True),
        (["layout.cp=2", "layout.processes=2", "layout.micro_batch=2"], False),
        (["layout.cp=2", "layout.processes=2", "schedule.stages.0.micro_batch=2"], False),
    ],
)
def test_positions_are_shared_unless_context_parallelism_deals_several_samples(overrides, shared):
    from llada_megatron.model import speed
    from llada_megatron.parallel import groups  # noqa: F401

    config = compose(["experiment=parity", *overrides])
    assert speed.options(config, layer_spec="transformer_engine")["apply_rope_fusion"] is shared
