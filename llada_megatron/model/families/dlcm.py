"""The `dlcm` family: model/dlcm.py from a configuration; its formulas are in config/families/dlcm.py."""

from __future__ import annotations

import math
from dataclasses import replace

from llada_megatron.attention.registry import Executor
from llada_megatron.config.families.dlcm import check_layout, concepts_of, tokens_of
from llada_megatron.config.schema import Config
from llada_megatron.model import speed
from llada_megatron.model.dlcm import Blocks, DynamicConcepts
from llada_megatron.model.families.gpt import transformer_config
from llada_megatron.model.initialize import initialize_weights
from llada_megatron.model.rotary import set_frequencies
from llada_megatron.model.specs import block_spec, resolve_layer_spec
from llada_megatron.model.widths import rate_divisor, width_ratio


def build_stage(
    config: Config,
    *,
    vp_stage: int | None = None,
    initialize: bool = True,
    attention: Executor | None = None,
) -> DynamicConcepts:
    """The whole model, on this rank's device, with counter-based initial weights.

    `attention` takes the place of the executor that model.attention_backend names.
    """
    check_layout(config)
    model, layer_spec = config.model, resolve_layer_spec(config.model)
    speed.refuse_here(config)
    backend = attention or model.attention_backend
    parts = {
        "encoder": tokens_of(model, model.concepts.encoder_layers),
        "backbone": concepts_of(model),
        "decoder": tokens_of(model, model.concepts.decoder_layers),
    }
    blocks: Blocks = {}
    for name, part in parts.items():
        layout = config.layout if part.has_experts else replace(config.layout, ep=1, etp=1)
        transformer = transformer_config(replace(config, model=part, layout=layout), layer_spec=layer_spec)
        spec = block_spec(
            transformer,
            layer_spec=layer_spec,
            attention=backend,
            vp_stage=None,
            lora=model.lora,
            router=model.router,
            expert_capacity=0,
        )
        blocks[name] = transformer, spec
    stage = DynamicConcepts(
        model,
        blocks,
        longest=config.data.sequence_length,
        backend=backend,
        output_scale=1 / width_ratio(model, "output_layer.weight"),
    )
    set_frequencies(stage, model)
    if initialize:
        initialize_weights(
            stage,
            seed=config.run.seed,
            std=model.init_std,
            layers=model.layers,
            scale=lambda name: 1 / math.sqrt(rate_divisor(model, name)),
        )
    return stage
