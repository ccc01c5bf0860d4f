"""Rules of the switches that change time, memory or rounding: what each needs, and what goes together.

They are those of megatron-core 0.19.2 (transformer_config.py, `__post_init__`) and of its layers, in words;
the device and the packages that a switch needs are looked at where a model is built (model/speed.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llada_megatron.config.choices import (
    Core,
    CudaGraphPart,
    Dispatcher,
    Dtype,
    Fp8,
    LayerSpec,
    OffloadModule,
    Recompute,
    RecomputeModule,
)
from llada_megatron.config.layout_rules import require
from llada_megatron.config.schedule import Schedule, Stage
from llada_megatron.config.schema import Config

OF_GROUPED_EXPERTS = {OffloadModule.expert_fc1, OffloadModule.moe_act}
"""Parts of TransformerEngine's grouped experts."""


def check_switches(config: Config, schedule: Schedule) -> None:
    """Raises BadInput with one sentence for switches that cannot be served, or not together."""
    rows = {stage.name: rows_of(config, stage) for stage in schedule.stages}
    _check_core(config)
    _check_dispatcher(config)
    _check_overlap_of_experts(config)
    _check_shared_experts(config)
    _check_tensor_parallel(config, set(rows.values()))
    _check_offload(config)
    _check_precision(config, rows)
    _check_graphs(config)


def rows_of(config: Config, stage: Stage) -> int:
    """Rows of a stage's micro-batch on one context-parallel process."""
    return stage.sequence_length * stage.rows_per_token * stage.micro_batch // config.layout.cp


def _needs_transformer_engine(config: Config, setting: str) -> None:
    require(
        config.model.layer_spec is LayerSpec.transformer_engine,
        f"{setting} needs TransformerEngine's layers: set model.layer_spec=transformer_engine (now"
        f" {config.model.layer_spec}), or leave it out.",
    )


def _check_core(config: Config) -> None:
    """What HybridModel lacks, or what nobody has run with it here."""
    model, layout = config.model, config.layout
    if model.core is Core.gpt:
        return
    require(
        not layout.overlap_experts,
        "layout.overlap_experts needs a schedule plan, which megatron-core's HybridModel has not: set"
        " model.core=gpt.",
    )
    for setting, is_set in {
        "layout.offload_modules": layout.offload_modules,
        "training.cuda_graphs": config.training.cuda_graphs,
    }.items():
        require(
            not is_set,
            f"{setting} has never run with model.core=hybrid: set model.core=gpt, or leave it out.",
        )


def _recomputed(config: Config) -> set[RecomputeModule]:
    selective = config.layout.recompute is Recompute.selective
    return set(config.layout.recompute_modules) if selective else set()


def _check_dispatcher(config: Config) -> None:
    layout = config.layout
    if not layout.dispatcher.is_flex:
        return
    require(
        config.model.has_experts and layout.ep * layout.etp > 1,
        f"layout.dispatcher={layout.dispatcher} brings tokens to experts of other processes: set layout.ep"
        " above 1, or layout.dispatcher=alltoall.",
    )
    require(
        config.precision.dtype is Dtype.bf16,
        f"layout.dispatcher={layout.dispatcher} sends bf16: set precision.dtype=bf16, or"
        " layout.dispatcher=alltoall.",
    )


def _check_overlap_of_experts(config: Config) -> None:
    layout, model = config.layout, config.model
    if not layout.overlap_experts:
        require(
            not layout.delay_weight_gradients,
            "layout.delay_weight_gradients fills the time of layout.overlap_experts: set both to true.",
        )
        return
    setting = "layout.overlap_experts"
    require(
        model.has_experts and layout.ep > 1,
        f"{setting} hides what travels between processes of layout.ep={layout.ep}: set it above 1.",
    )
    require(
        layout.dispatcher is not Dispatcher.allgather,
        f"{setting} does not go with layout.dispatcher=allgather: take alltoall, deepep or hybridep.",
    )
    require(
        layout.pp == 1 or layout.vpp > 1,
        f"{setting} needs an interleaved pipeline: set layout.vpp above 1, or layout.pp=1.",
    )
    require(
        layout.recompute is not Recompute.full and RecomputeModule.moe not in _recomputed(config),
        f"{setting} runs a layer in parts, which recompute of whole layers or of `moe` cannot repeat: set"
        " layout.recompute=selective without moe in layout.recompute_modules.",
    )
    require(
        config.precision.dtype is Dtype.bf16,
        f"{setting} is megatron-core's for bf16 alone: set precision.dtype=bf16.",
    )
    require(
        model.expert_balance_clean_half and not model.expert_capacity,
        f"{setting} hands routers no marks of rows (megatron-core's fine_grained_callables.py:130): set"
        " model.expert_balance_clean_half=true and model.expert_capacity=0.",
    )
    if layout.delay_weight_gradients:
        _needs_transformer_engine(config, "layout.delay_weight_gradients")


def _check_shared_experts(config: Config) -> None:
    layout, model = config.layout, config.model
    if not layout.overlap_shared_experts:
        return
    setting = "layout.overlap_shared_experts"
    require(
        model.has_experts and model.shared_expert_hidden_size > 0,
        f"{setting} needs a shared expert: set model.shared_expert_hidden_size, or {setting}=false.",
    )
    require(
        layout.dispatcher is not Dispatcher.allgather,
        f"{setting} does not go with layout.dispatcher=allgather: take alltoall, deepep or hybridep.",
    )
    require(
        not layout.overlap_experts,
        f"{setting} and layout.overlap_experts use the same gap: choose one.",
    )
    require(
        RecomputeModule.shared_experts not in _recomputed(config),
        f"{setting} cannot be computed again: leave shared_experts out of layout.recompute_modules.",
    )


def _check_tensor_parallel(config: Config, rows: set[int]) -> None:
    layout = config.layout
    if not layout.overlap_tensor_parallel:
        return
    setting = "layout.overlap_tensor_parallel"
    _needs_transformer_engine(config, setting)
    require(
        not config.model.mla.is_used,
        f"{setting} is turned off by megatron-core where it meets the projections of model.mla: set it to"
        " false.",
    )
    require(
        layout.tp > 1, f"{setting} hides messages of layout.tp: set layout.tp above 1, or {setting}=false."
    )
    require(
        len(rows) <= 1,
        f"{setting} keeps buffers of one size, but the stages have micro-batches of {_listed(rows)} rows:"
        " give the stages a micro_batch that makes them equal.",
    )


def _check_offload(config: Config) -> None:
    modules, recomputed = set(config.layout.offload_modules), _recomputed(config)
    if not modules:
        return
    setting = "layout.offload_modules"
    _needs_transformer_engine(config, setting)  # whose hooks move what is saved for backward
    inside = modules & OF_GROUPED_EXPERTS
    require(
        not inside or RecomputeModule.moe not in recomputed,
        f"{setting} has {_listed(inside)}, which `moe` in layout.recompute_modules computes again: leave one"
        " of them out.",
    )
    moved = modules & {OffloadModule.qkv_linear, OffloadModule.core_attn}
    require(
        not moved or RecomputeModule.mla_up_proj not in recomputed,
        f"{setting} has {_listed(moved)}, beside what `mla_up_proj` in layout.recompute_modules computes"
        " again: leave one of them out.",
    )
    require(
        OffloadModule.attn_proj not in modules or OffloadModule.core_attn in modules,
        f"{setting} has attn_proj, whose input core_attn keeps as well: add core_attn.",
    )
    require(
        config.layout.recompute is not Recompute.full,
        f"{setting} has nothing to move while layout.recompute=full: set layout.recompute=selective or none.",
    )


def _check_precision(config: Config, rows: Mapping[str, int]) -> None:
    precision = config.precision
    require(
        precision.gradients is Dtype.fp32 or precision.dtype is Dtype.bf16,
        "precision.gradients=bf16 needs precision.dtype=bf16: gradients have at least the weights' digits.",
    )
    if precision.fp8 is Fp8.none:
        return
    _needs_transformer_engine(config, f"precision.fp8={precision.fp8}")
    require(
        precision.dtype is Dtype.bf16,
        f"precision.fp8={precision.fp8} rounds products of bf16: set precision.dtype=bf16.",
    )
    again = _recomputed(config) & {RecomputeModule.moe_act, RecomputeModule.layernorm}
    require(
        precision.fp8 is not Fp8.delayed or not again,
        f"precision.fp8=delayed cannot compute {_listed(again)} again: leave them out of"
        " layout.recompute_modules, or take another recipe.",
    )
    require(
        not config.evaluation.infill_sequences,
        f"precision.fp8={precision.fp8} cannot decode between steps, a block's few rows at a time: set"
        " evaluation.infill_sequences=0.",
    )
    multiple = 32 if precision.fp8 is Fp8.mxfp8 else 16
    own = {f"rows of stage {name}": count // config.layout.tp for name, count in rows.items()}
    for name, size in (_widths(config) | own).items():
        require(
            size % multiple == 0,
            f"precision.fp8={precision.fp8} needs sizes in multiples of {multiple}, but a process has {name}:"
            f" {size}; change that or the axis that cuts it, or leave FP8 out.",
        )


def _widths(config: Config) -> dict[str, int]:
    """What a product of this layout reads or gives on one process, by name."""
    model, layout = config.model, config.layout
    widths = {
        "model.hidden_size": model.hidden_size,
        "heads * head_dim": model.heads * model.head_dim // layout.tp,
    }
    if model.mla.is_used:
        widths["model.mla.q_lora_rank"] = model.mla.q_lora_rank
        widths["model.mla.kv_lora_rank"] = model.mla.kv_lora_rank
        widths["model.mla.kv_lora_rank + qk_rope_head_dim"] = (
            model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
        )
        widths["heads * v_head_dim"] = model.heads * model.value_dim // layout.tp
    if model.dense_layers:
        widths["model.ffn_hidden_size"] = model.ffn_hidden_size // layout.tp
    if model.has_experts:
        widths["model.expert_hidden_size"] = model.expert_hidden_size // layout.etp
        widths["model.shared_expert_hidden_size"] = model.shared_expert_hidden_size // layout.tp
    return widths


def _check_graphs(config: Config) -> None:
    parts, layout, model = set(config.training.cuda_graphs), config.layout, config.model
    if not parts:
        return
    setting = "training.cuda_graphs"
    _needs_transformer_engine(config, setting)
    routed = parts & {CudaGraphPart.moe_router, CudaGraphPart.moe_preprocess}
    require(
        CudaGraphPart.moe_preprocess not in parts or CudaGraphPart.moe_router in parts,
        f"{setting} has moe_preprocess, which goes on from moe_router: add moe_router.",
    )
    require(
        not routed or model.has_experts,
        f"{setting} has {_listed(routed)}, but no layer has experts: leave it out.",
    )
    require(
        CudaGraphPart.mlp not in parts or (model.dense_layers > 0 and not layout.overlap_experts),
        f"{setting} has mlp, that of dense layers, which needs model.dense_layers and goes without"
        " layout.overlap_experts: leave it out.",
    )
    require(
        layout.recompute is not Recompute.full,
        f"{setting} cannot be captured under layout.recompute=full: set layout.recompute=selective or none.",
    )
    require(
        not routed or RecomputeModule.moe not in _recomputed(config),
        f"{setting} has {_listed(routed)}, which `moe` in layout.recompute_modules computes again: leave one"
        " of them out.",
    )
    require(
        not routed or not _reads_on_host(config),
        f"{setting} replays a router, which then can neither mark nor drop rows nor learn from losses of its"
        " own: set model.router to its defaults, model.expert_balance_clean_half=true,"
        " model.expert_capacity=0 and training.figures_every_steps=0.",
    )


def _reads_on_host(config: Config) -> bool:
    """Whether a router does more than kernels of one shape, or gets more than hidden states."""
    router, model = config.model.router, config.model
    marked = bool(model.expert_capacity) or not model.expert_balance_clean_half
    return marked or router.has_losses or bool(router.rows_cap) or config.training.figures_every_steps > 0


def _listed(names: Iterable[object]) -> str:
    return ", ".join(sorted(map(str, names)))
