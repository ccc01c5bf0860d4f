"""The `gpt` family: megatron-core's GPTModel or HybridModel; its formulas are in config/families/gpt.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from llada_megatron.attention.registry import Executor
from llada_megatron.config.last_layer import drops_clean_rows
from llada_megatron.config.layout import pipeline_stages
from llada_megatron.config.schema import Config, Core, LayoutConfig, ModelConfig, Recompute
from llada_megatron.model import speed
from llada_megatron.model.gpt import BlockDiffusionGPT, BlockDiffusionStage
from llada_megatron.model.hybrid import HALVES, BlockDiffusionHybrid
from llada_megatron.model.initialize import initialize_weights
from llada_megatron.model.rotary import ExplicitRotary, set_frequencies
from llada_megatron.model.router import UNCAPPED
from llada_megatron.model.specs import block_spec, resolve_layer_spec
from llada_megatron.runtime import device


def transformer_config(config: Config, *, layer_spec: str) -> TransformerConfig:
    """megatron-core's configuration of a run's architecture under its layout.

    Two choices are no settings, because the other one computes wrong results without an error: pipeline
    outputs are kept on gloo, and p2p is never batched (runtime/mcore_cpu.py).
    """
    model, layout = config.model, config.layout
    dtype = device.DTYPES[config.precision.dtype]
    moe = model.has_experts
    fused = layer_spec == "transformer_engine"
    layers_of_one = HALVES if model.core is Core.hybrid else 1
    grouped = moe and model.expert_groups > 1 and not model.expert_capacity
    return (MLATransformerConfig if model.mla.is_used else TransformerConfig)(
        # architecture
        **_latents(model),
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        qk_layernorm=model.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,  # model/initialize.py fills the weights
        # experts
        num_moe_experts=model.experts if moe else None,
        moe_layer_freq=[int(layer >= model.dense_layers) for layer in range(model.layers)] if moe else 1,
        moe_router_topk=max(model.experts_per_token, 1),
        moe_router_score_function=model.expert_score.value,
        moe_router_pre_softmax=not model.normalize_expert_weights,
        moe_router_enable_expert_bias=moe and model.expert_bias,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_router_num_groups=model.expert_groups if grouped else None,
        moe_router_group_topk=model.expert_groups_per_token if grouped else None,
        moe_router_topk_scaling_factor=model.routed_scaling_factor,
        moe_ffn_hidden_size=model.expert_hidden_size if moe else None,
        moe_shared_expert_intermediate_size=(model.shared_expert_hidden_size or None) if moe else None,
        moe_grouped_gemm=moe and fused,
        moe_expert_capacity_factor=UNCAPPED * model.experts if moe and model.router.rows_cap else None,
        # layout
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,  # megatron-core refuses to train MoE with TP and without SP
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(model.layers, layout),
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        deallocate_pipeline_outputs=device.on_cuda(),
        batch_p2p_comm=False,
        overlap_p2p_comm=layout.vpp > 1,
        variable_seq_lengths=False,
        recompute_granularity=None if layout.recompute is Recompute.none else layout.recompute.value,
        recompute_modules=list(layout.recompute_modules) if layout.recompute is Recompute.selective else None,
        recompute_method="uniform" if layout.recompute is Recompute.full else None,
        recompute_num_layers=layers_of_one if layout.recompute is Recompute.full else None,
        # numbers
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=False,
        calculate_per_token_loss=True,  # the loss is a sum over the batch divided by a global count
        # fusions that a CPU cannot serve, or that pay nothing
        persist_layer_norm=False,
        bias_activation_fusion=True,  # SwiGLU keeps its input alone for backward, and runs anywhere
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,  # of TransformerEngine's layers, in training/optimizer.py
        **speed.options(config, layer_spec=layer_spec),
    )


def _latents(model: ModelConfig) -> dict[str, Any]:
    """Fields of MLATransformerConfig. Its rotary embeddings are never asked: model/mla.py."""
    if not model.mla.is_used:
        return {}
    return {
        "q_lora_rank": model.mla.q_lora_rank or None,
        "kv_lora_rank": model.mla.kv_lora_rank,
        "qk_head_dim": model.mla.qk_nope_head_dim,
        "qk_pos_emb_head_dim": model.mla.qk_rope_head_dim,
        "v_head_dim": model.mla.v_head_dim,
        "rope_type": "rope",
    }


def pipeline_layout(layers: int, layout: LayoutConfig) -> list[list[str]] | None:
    """What each stage holds, in megatron-core's words; None where its own even split is meant."""
    stages = [["decoder"] * count for count in pipeline_stages(layers, layout)]
    if all(stage == stages[0] for stage in stages):
        return None
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def build_stage(
    config: Config,
    *,
    vp_stage: int | None = None,
    initialize: bool = True,
    attention: Executor | None = None,
) -> BlockDiffusionStage:
    """This rank's (virtual) pipeline stage, on its device, with counter-based initial weights.

    `attention` takes the place of the executor that model.attention_backend names.
    """
    model = config.model
    layer_spec = resolve_layer_spec(model)
    speed.refuse_here(config)
    transformer = transformer_config(config, layer_spec=layer_spec)
    is_last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
    stage = _class_of(config)(
        transformer,
        block_spec(
            transformer,
            layer_spec=layer_spec,
            attention=attention or model.attention_backend,
            vp_stage=vp_stage,
            lora=model.lora,
            router=model.router,
            expert_capacity=model.expert_capacity,
            drops_clean_rows=is_last and drops_clean_rows(config, config.layout),
        ),
        vocab_size=model.vocab_size,
        max_sequence_length=2 * config.data.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=is_last,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tied_head,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        rotary=ExplicitRotary(),
        head_chunk_tokens=model.head_chunk_tokens,
        fuses_cross_entropy=speed.fused(config, layer_spec=layer_spec),
        balance_clean_half=model.expert_balance_clean_half,
        routes_blocks=model.has_experts and model.expert_capacity > 0,
    )
    set_frequencies(stage, model)
    if initialize:
        initialize_weights(stage, seed=config.run.seed, std=model.init_std, layers=model.layers)
    return stage


def _class_of(config: Config) -> Callable[..., BlockDiffusionStage]:
    """What model.core names."""
    model = config.model
    if model.core is Core.gpt:
        return BlockDiffusionGPT
    stages = pipeline_stages(model.layers, config.layout)
    return partial(BlockDiffusionHybrid, stages=stages, dense_layers=model.dense_layers)
