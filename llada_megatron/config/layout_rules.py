"""Rules of a layout: what megatron-core would refuse later, or compute wrongly, is refused without torch.

Each message names the setting to change and values that would work.
"""

from __future__ import annotations

import math

from llada_megatron.config.choices import AdapterTarget, LayerSpec, Recompute, RecomputeModule
from llada_megatron.config.errors import BadInput
from llada_megatron.config.layout import data_parallel_size, micro_batches_per_step, pipeline_stages
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig

NEED_TRANSFORMER_ENGINE = {
    RecomputeModule.layernorm: "tensor_parallel/random.py:693 calls TransformerEngine",
    RecomputeModule.moe_act: "only grouped experts have it",
}


def require(condition: bool, message: str) -> None:
    """Raise BadInput(message) unless the condition holds."""
    if not condition:
        raise BadInput(message)


def check_layout(config: Config) -> None:
    """Everything about a layout that needs no schedule. Raises BadInput with one sentence."""
    layout, model = config.layout, config.model
    _check_processes(layout)
    _check_tensor_parallel(layout, model)
    _check_experts(layout, model)
    _check_adapters(layout, model)
    _check_pipeline(layout, model)
    split = layout.cp * layout.tp
    lengths = {"data.": config.data.sequence_length}
    lengths |= {f"schedule.stages[{n}].": own.sequence_length for n, own in enumerate(config.schedule.stages)}
    for where, length in lengths.items():
        require(
            length % split == 0,
            f"{where}sequence_length={length} is not a multiple of layout.cp*tp={split} (context and sequence"
            " parallelism split it evenly): make it one, or choose another layout.cp or layout.tp.",
        )
    _check_options(layout, model)


def check_batches(layout: LayoutConfig, schedule: Schedule) -> None:
    """Every stage's micro-batches come out whole, and in groups where the pipeline is interleaved."""
    require(
        layout.bp == 1,
        f"layout.bp={layout.bp} deals branches of decoding over ranks, of which training has none: set"
        " layout.bp=1.",
    )
    dp, group = data_parallel_size(layout), layout.pp if layout.vpp > 1 else 1
    all_of_them = math.lcm(*(stage.micro_batch for stage in schedule.stages)) * dp * group
    for stage in schedule.stages:
        total, per_step = stage.global_batch, stage.micro_batch * dp
        larger = _next_multiple(total, all_of_them)
        is_runs = total == layout.global_batch
        setting = "layout.global_batch" if is_runs else f"schedule.stages[{stage.index}].global_batch"
        require(
            total % per_step == 0,
            f"{setting}={total} is not a multiple of micro_batch*dp={per_step} (stage {stage.name}): make"
            f" {setting} {larger}, or change micro_batch.",
        )
        micro_batches = micro_batches_per_step(layout, stage)
        require(
            micro_batches % group == 0,
            f"layout.vpp={layout.vpp} needs micro-batches per step in multiples of layout.pp={layout.pp}, but"
            f" stage {stage.name} has {micro_batches}: make {setting} {larger}, or layout.vpp 1.",
        )


def _check_processes(layout: LayoutConfig) -> None:
    dense, experts = layout.tp * layout.pp * layout.cp * layout.bp, layout.ep * layout.etp * layout.pp
    of_dense = "tp*pp*cp*bp" if layout.bp > 1 else "tp*pp*cp"
    for names, share in ((of_dense, dense), ("ep*etp*pp", experts)):
        require(
            layout.processes % share == 0,
            f"layout.processes={layout.processes} is not a multiple of layout.{names}={share}: use"
            f" {_next_multiple(layout.processes, math.lcm(dense, experts))} processes, or smaller"
            f" {names.replace('*', ', ')}.",
        )


def _check_tensor_parallel(layout: LayoutConfig, model: ModelConfig) -> None:
    """Heads, kv heads, vocabulary and feed-forward widths are cut into tp equal parts."""
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "vocab_size": model.vocab_size}
    if model.mla.is_used:
        sizes["mla.q_lora_rank"] = model.mla.q_lora_rank
        sizes["mla.kv_lora_rank + qk_rope_head_dim"] = model.mla.kv_lora_rank + model.mla.qk_rope_head_dim
    if model.dense_layers:
        sizes["ffn_hidden_size"] = model.ffn_hidden_size
    if model.has_experts and model.shared_expert_hidden_size:
        sizes["shared_expert_hidden_size"] = model.shared_expert_hidden_size
    others = layout.pp * layout.cp
    for name, size in sizes.items():
        padding = (
            f", or pad model.{name} to {_next_multiple(size, layout.tp)}" if name == "vocab_size" else ""
        )
        require(
            size % layout.tp == 0,
            f"layout.tp={layout.tp} does not divide model.{name}={size}: use a layout.tp of"
            f" {_divisors(layout.processes // others, *sizes.values())}{padding}.",
        )


def _check_experts(layout: LayoutConfig, model: ModelConfig) -> None:
    others = {"ep": layout.etp * layout.pp, "etp": layout.ep * layout.pp}
    divided = {"ep": "experts", "etp": "expert_hidden_size"}
    for axis, of in divided.items():
        ways, size = getattr(layout, axis), getattr(model, of)
        require(
            ways == 1 or model.has_experts,
            f"layout.{axis}={ways} divides experts, but no layer has any: set layout.{axis}=1.",
        )
        require(
            ways == 1 or size % ways == 0,
            f"layout.{axis}={ways} does not divide model.{of}={size}: use a layout.{axis} of"
            f" {_divisors(layout.processes // others[axis], size)}.",
        )
    cap = model.router.rows_cap
    require(
        cap == 0 or cap >= 1,
        f"model.router.rows_cap={cap:g} is below the mean, which balanced experts get: give at least 1, or 0"
        " for no cap.",
    )


def _check_adapters(layout: LayoutConfig, model: ModelConfig) -> None:
    """An expert's adapter is cut along its rank where its matrices are cut (model/adapters.py)."""
    rank, among = model.lora.rank, AdapterTarget.experts in model.lora.targets
    require(
        not among or rank % layout.etp == 0,
        f"layout.etp={layout.etp} does not divide model.lora.rank={rank}: make the rank a multiple, or leave"
        " experts out of model.lora.targets.",
    )
    require(
        not rank or bool(model.lora.targets),
        f"model.lora.targets is empty while model.lora.rank={rank}: choose from {', '.join(AdapterTarget)}.",
    )


def _check_pipeline(layout: LayoutConfig, model: ModelConfig) -> None:
    require(
        layout.vpp == 1 or layout.pp > 1,
        f"layout.vpp={layout.vpp} interleaves a pipeline's stages: set layout.vpp=1, or layout.pp above 1.",
    )
    stages, layers = layout.pp * layout.vpp, model.layers
    if not layout.pipeline:
        require(
            stages <= layers,
            f"layout.pp*vpp={stages} is more than model.layers={layers}: use at most {layers} stages.",
        )
        even = [layers // stages + (stage < layers % stages) for stage in range(stages)]
        require(
            layers % stages == 0,
            f"model.layers={layers} is not a multiple of layout.pp*vpp={stages}: give the layers of each"
            f" stage, for example layout.pipeline=[{','.join(map(str, even))}].",
        )
        return
    given = pipeline_stages(layers, layout)
    require(
        len(given) == stages,
        f"layout.pipeline={given} has {len(given)} entries, not one for each of pp*vpp={stages} stages: give"
        f" {stages}.",
    )
    require(
        sum(given) == layers,
        f"layout.pipeline={given} adds up to {sum(given)}, not to model.layers={layers}: change an entry by"
        f" {layers - sum(given):+d}.",
    )
    require(
        all(count >= 1 for count in given[1:-1]) and min(given) >= 0,
        f"layout.pipeline={given} leaves a stage without layers: only the first, which embeds, and the last,"
        " which computes the head, may have 0.",
    )


def _check_options(layout: LayoutConfig, model: ModelConfig) -> None:
    require(
        layout.overlap_grad_reduce or not layout.overlap_param_gather,
        "layout.overlap_param_gather needs layout.overlap_grad_reduce: set both to true.",
    )
    if layout.recompute is not Recompute.selective:
        return
    require(
        bool(layout.recompute_modules),
        "layout.recompute_modules is empty while layout.recompute=selective: choose from"
        f" {', '.join(RecomputeModule)}.",
    )
    for name in layout.recompute_modules:
        require(
            name not in NEED_TRANSFORMER_ENGINE or model.layer_spec is LayerSpec.transformer_engine,
            f"layout.recompute_modules has '{name}', which needs TransformerEngine: set"
            f" model.layer_spec=transformer_engine (now {model.layer_spec}), or leave {name} out.",
        )
    require(
        RecomputeModule.mla_up_proj not in layout.recompute_modules or model.mla.is_used,
        "layout.recompute_modules has 'mla_up_proj', the ways up from latents, which only model.mla has:"
        " leave it out.",
    )


def _next_multiple(number: int, of: int) -> int:
    return -(-number // of) * of


def _divisors(*sizes: int) -> str:
    """The numbers that divide all sizes, as text."""
    common = math.gcd(*sizes)
    return ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
