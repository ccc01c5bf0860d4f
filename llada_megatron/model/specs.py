"""Layer specs: `local` runs anywhere, `transformer_engine` on CUDA; both write the same checkpoint keys."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.attention.registry import Executor
from llada_megatron.config.errors import BadInput
from llada_megatron.config.router import RouterConfig
from llada_megatron.config.schema import LoraConfig, ModelConfig
from llada_megatron.model.adapters import adapt
from llada_megatron.model.core_attention import (
    BlockDiffusionCoreAttention,
    get_bias_dropout_add_of_noisy_rows,
)
from llada_megatron.model.experts import Experts
from llada_megatron.model.mla import LatentAttention
from llada_megatron.model.router import BalancedRouter
from llada_megatron.runtime import device


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm in the parameters' dtype, marked for sequence parallelism as TransformerEngine's is.

    megatron-core's WrappedTorchNorm refuses sequence parallelism and keeps its weight in fp32.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def resolve_layer_spec(model: ModelConfig) -> str:
    """`local` or `transformer_engine` for model.layer_spec; BadInput when it cannot be served here.

    Adapters stand beside the local spec's layers: TransformerEngine's fuse the norm into them, and experts
    into one product.
    """
    name, has_adapters = model.layer_spec, model.lora.rank > 0
    installed = importlib.util.find_spec("transformer_engine") is not None
    if name == "auto":
        fused = device.on_cuda() and installed and not has_adapters
        return "transformer_engine" if fused else "local"
    if name == "transformer_engine" and has_adapters:
        raise BadInput("model.lora needs model.layer_spec=local (or auto), not transformer_engine.")
    if name == "transformer_engine" and not installed:
        raise BadInput("model.layer_spec=transformer_engine needs the package: pip install '.[cuda]'.")
    return name


def layer_spec_line(model: ModelConfig) -> str:
    """Which layers a model gets here and why not TransformerEngine's; BadInput when it cannot be served."""
    name = resolve_layer_spec(model)
    if model.layer_spec != "auto":
        return f"{name}: set by model.layer_spec"
    if name == "transformer_engine":
        return f"{name}: the fastest that can serve here"
    if not device.on_cuda():
        reason = "needs a CUDA device"
    elif model.lora.rank:
        reason = "holds no adapters"
    else:
        reason = "is not installed (pip install '.[cuda]')"
    return f"{name}: transformer_engine {reason}"


def block_spec(
    config: TransformerConfig,
    *,
    layer_spec: str,
    attention: str | Executor,
    vp_stage: int | None,
    lora: LoraConfig,
    router: RouterConfig,
    expert_capacity: int,
    drops_clean_rows: bool = False,
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage with our attention, router, and in the local spec norms and experts.

    `attention` is a setting of model.attention_backend, or an executor itself. With `drops_clean_rows`
    the last of the layers goes on behind its attention with noisy rows alone, where nothing reads others.

    In its local spec megatron-core 0.19.2 writes the pre-MLP norm of MoE layers under the key of a fused
    linear layer that MoE layers do not have (gpt_layer_specs.py:459); the TE spec writes
    `pre_mlp_layernorm`. The entry is dropped here for MoE layers, so that the keys agree.
    """
    transformer_engine = layer_spec == "transformer_engine"
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=transformer_engine, vp_stage=vp_stage)
    routers = partial(BalancedRouter, settings=router, expert_capacity=expert_capacity)
    core_attention = partial(BlockDiffusionCoreAttention, backend=attention)
    spec.layer_specs = [copy.deepcopy(layer) for layer in spec.layer_specs]
    for layer in spec.layer_specs:
        submodules = layer.submodules
        submodules.self_attention.submodules.core_attention = core_attention
        is_moe = submodules.mlp.func is MoELayer
        if is_moe:
            moe = replace(submodules.mlp.keywords["submodules"], router=routers)
            if not transformer_engine:
                moe = replace(moe, experts=partial(Experts, **moe.experts.keywords))
            submodules.mlp = partial(MoELayer, submodules=moe)
        if config.multi_latent_attention:
            _use_latents(layer, attention, is_moe=is_moe, transformer_engine=transformer_engine)
        if transformer_engine:
            continue
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm and not config.multi_latent_attention:
            submodules.self_attention.submodules.q_layernorm = RMSNorm
            submodules.self_attention.submodules.k_layernorm = RMSNorm
        if is_moe:
            submodules.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
        if lora.rank:
            adapt(layer, lora)
    if drops_clean_rows:
        submodules = spec.layer_specs[-1].submodules
        submodules.self_attention.submodules.core_attention = partial(core_attention, is_last=True)
        submodules.self_attn_bda = get_bias_dropout_add_of_noisy_rows
    if not transformer_engine:
        spec.layer_norm = RMSNorm
    return spec


def _use_latents(
    layer: ModuleSpec, backend: str | Executor, *, is_moe: bool, transformer_engine: bool
) -> None:
    """Our attention over latents (model/mla.py), under keys that both specs write.

    The norms of latents are modules of their own; a dense layer's norm has the key of TransformerEngine's,
    which is fused into the layer behind it.
    """
    submodules, norm = layer.submodules, RMSNorm
    submodules.self_attention.module = LatentAttention
    attention = submodules.self_attention.submodules
    attention.core_attention = ModuleSpec(BlockDiffusionCoreAttention, params={"backend": backend})
    if transformer_engine:
        engine = importlib.import_module("megatron.core.extensions.transformer_engine_spec_provider")
        provider = engine.TESpecProvider()
        norm = provider.layer_norm(rms_norm=True, for_qk=True)
        attention.linear_q_up_proj = attention.linear_kv_up_proj = provider.column_parallel_linear()
    elif not is_moe:
        submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    attention.q_layernorm = attention.kv_layernorm = norm
