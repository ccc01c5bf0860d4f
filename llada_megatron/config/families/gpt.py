"""The `gpt` family: attention, then a dense feed-forward layer or a Mixture of Experts.

Ling 2.0, LLaDA, Llama, Qwen, DeepSeek-V3. Parameters by what divides them: tensor parallelism, nothing, or
expert parallelism.
Legend: H hidden_size, F ffn_hidden_size, Fe and Fs expert and shared_expert hidden sizes, E experts, V
vocab_size.

    a layer's attention    gpt_attention.py                        / tp
    a layer's norms        2H, and those inside its attention      replicated over tp
    a dense layer          3 H F (gate and up in one, and down)    / tp
    a MoE layer            3 H Fs of the shared expert             / tp
                           E H of the router                       replicated over tp
                           3 H Fe E of the experts                 / (ep etp)
                           E of expert_bias, fp32, no gradient     replicated
    embedding, head        V H each                                / tp, on the first and the last stage
    final norm             H                                       replicated, on the last stage

A tied head is the embedding where one stage holds both, and a copy of it on the last stage otherwise; the
copy counts on its process and not in the total.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace

from llada_megatron.config.choices import Core, ExpertScore
from llada_megatron.config.contents import Coarse, Contents, Parameters, Watched, aligned, separate_experts
from llada_megatron.config.families.gpt_adapters import active_adapters as active_adapters
from llada_megatron.config.families.gpt_adapters import adapter_parameters
from llada_megatron.config.families.gpt_attention import (
    attention_matrices,
    attention_norms,
    attention_weights,
    check_attention,
    qkv_biases,
    up_weights,
)
from llada_megatron.config.families.gpt_attention import kept_numbers as kept_numbers
from llada_megatron.config.families.gpt_attention import pair_flops as pair_flops
from llada_megatron.config.layout import pipeline_stages
from llada_megatron.config.layout_rules import require
from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config, LayoutConfig, LoraConfig, ModelConfig, RotaryScaling

FILLS_MASKS = True


def check(model: ModelConfig) -> None:
    """Raise BadInput for settings of an architecture that cannot be built."""
    require(
        not model.dense_layers or model.ffn_hidden_size > 0,
        "model.ffn_hidden_size is 0 but model.dense_layers is not: set model.ffn_hidden_size.",
    )
    require(
        0 <= model.mask_token_id < model.vocab_size,
        f"model.mask_token_id={model.mask_token_id} is outside model.vocab_size={model.vocab_size}.",
    )
    check_attention(model)
    _check_scaling(model)
    if not model.has_experts:
        return
    for name in ("experts", "expert_hidden_size"):
        require(
            getattr(model, name) > 0,
            f"model.{name} is 0 but model.dense_layers < model.layers: set model.{name}.",
        )
    _check_scores(model)
    if model.expert_capacity:
        _check_pools(model)
    else:
        _check_groups(model)


def check_layout(config: Config) -> None:
    """Nothing beside the rules for all families."""


def check_run(config: Config, schedule: Schedule) -> None:
    """Raise BadInput for settings of concepts, which nothing of the family reads."""
    for each in fields(config.model.concepts):
        value = getattr(config.model.concepts, each.name)
        require(
            value == each.default,
            f"model.concepts.{each.name}={value} means nothing with model.family=gpt: leave it out, or set"
            " model.family=dlcm.",
        )


def _check_scores(model: ModelConfig) -> None:
    """What megatron-core can do with a score function."""
    score = f"model.expert_score={model.expert_score}"
    if model.expert_score is ExpertScore.sigmoid:
        require(
            model.normalize_expert_weights,
            f"model.normalize_expert_weights=false needs"
            f" model.expert_score=softmax, not {model.expert_score}.",
        )
        return
    require(
        not model.expert_bias,
        f"{score} needs model.expert_bias=false: the bias corrects sigmoids; model.router.sequence_balance"
        " balances experts without it.",
    )
    require(
        model.expert_groups == 1 or not model.normalize_expert_weights,
        f"{score} scores model.expert_groups={model.expert_groups} by shares of all experts: set"
        " model.normalize_expert_weights=false, or model.expert_groups=1.",
    )
    require(
        model.experts_per_token > 1 or not model.normalize_expert_weights,
        f"{score} of one expert per token is always 1: set model.normalize_expert_weights=false.",
    )


def _check_groups(model: ModelConfig) -> None:
    require(
        model.experts % model.expert_groups == 0,
        f"model.experts={model.experts} is not a multiple of model.expert_groups={model.expert_groups}.",
    )
    reachable = model.experts // model.expert_groups * model.expert_groups_per_token
    require(
        0 < model.experts_per_token <= reachable,
        f"model.experts_per_token={model.experts_per_token} must be between 1 and the {reachable} experts of"
        " model.expert_groups_per_token groups.",
    )
    require(
        model.expert_groups == 1 or model.experts_per_token % model.expert_groups_per_token == 0,
        f"model.experts_per_token={model.experts_per_token} is not a multiple of"
        f" model.expert_groups_per_token={model.expert_groups_per_token}: megatron-core scores a group by its"
        " experts_per_token/expert_groups_per_token best experts.",
    )


def _check_pools(model: ModelConfig) -> None:
    """Of block routing, which uses no groups."""
    capacity = model.expert_capacity
    require(
        0 < model.experts_per_token <= capacity <= model.experts,
        f"model.expert_capacity={capacity} must be from the {model.experts_per_token} experts of a token to"
        f" all {model.experts}, or 0 for no pools.",
    )
    require(
        model.expert_bias,
        f"model.expert_capacity={capacity} needs model.expert_bias=true: pools are chosen by biased scores.",
    )


def _check_scaling(model: ModelConfig) -> None:
    """Whether the frequencies of model.rotary_scaling are defined."""
    scaling, name = model.rotary_scaling, "model.rotary_scaling"
    if scaling.type is RotaryScaling.none:
        return
    if scaling.type is RotaryScaling.linear:
        return
    require(
        scaling.original_positions >= 1,
        f"{name}.original_positions={scaling.original_positions} must be the longest position of pretraining:"
        f" {name}.type={scaling.type} needs it.",
    )
    if scaling.type is RotaryScaling.llama3:
        require(
            scaling.low_freq_factor < scaling.high_freq_factor,
            f"{name}.low_freq_factor={scaling.low_freq_factor} must be below"
            f" {name}.high_freq_factor={scaling.high_freq_factor}.",
        )
        return
    require(
        scaling.beta_slow <= scaling.beta_fast,
        f"{name}.beta_slow={scaling.beta_slow} must be at most {name}.beta_fast={scaling.beta_fast}.",
    )
    require(model.rotary_base > 1, f"model.rotary_base={model.rotary_base} must be above 1 for yarn.")


def stage_contents(model: ModelConfig, layout: LayoutConfig) -> list[list[Contents]]:
    """For each pipeline rank its (virtual) stages in the data's order; the first dense_layers are dense."""
    counts = pipeline_stages(model.layers, layout)
    ranks: list[list[Contents]] = [[] for _ in range(layout.pp)]
    start = 0
    for index, count in enumerate(counts):
        dense = max(0, min(model.dense_layers - start, count))
        ranks[index % layout.pp].append(
            Contents(dense, count - dense, first=index == 0, last=index == len(counts) - 1)
        )
        start += count
    return ranks


def parameters(
    model: ModelConfig, contents: Iterable[Contents], *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """Parameters of one process that holds these stages; with adapters these, beside what is frozen."""
    contents = list(contents)
    if model.lora.rank:
        base = parameters(replace(model, lora=LoraConfig()), contents, tp=tp, ep=ep, etp=etp)
        return adapter_parameters(model, contents, base, tp=tp, ep=ep, etp=etp)
    dense = moe = 0
    first = last = False
    for stage in contents:
        dense, moe = dense + stage.dense, moe + stage.moe
        first, last = first or stage.first, last or stage.last
    layers, hidden = dense + moe, model.hidden_size
    vocabulary = model.vocab_size * hidden * (first + last - (model.tied_head and first and last))
    sharded = (
        layers * (attention_weights(model) + qkv_biases(model))
        + dense * 3 * hidden * model.ffn_hidden_size
        + moe * 3 * hidden * model.shared_expert_hidden_size
        + vocabulary
    )
    norms = 2 * hidden + sum(attention_norms(model))
    return Parameters(
        sharded=sharded // tp,
        replicated=layers * norms + moe * model.experts * hidden + last * hidden,
        expert=moe * model.experts * expert_weights(model) // (ep * etp),
        bias=moe * model.experts if model.expert_bias else 0,
        counts=moe * model.experts,
        buffers=tuple(_buffers(model, stage, tp=tp, ep=ep, etp=etp) for stage in contents),
    )


def _buffers(model: ModelConfig, stage: Contents, *, tp: int, ep: int, etp: int) -> tuple[int, int]:
    """Elements of a stage's gradient buffers: dense parameters, and those of experts kept apart."""
    hidden = model.hidden_size
    matrices = (size // tp for size in (*attention_matrices(model), qkv_biases(model)))
    attention = aligned(*matrices, *attention_norms(model), hidden, hidden)
    feed_forward, shared = (
        aligned(2 * hidden * width // tp, hidden * width // tp)
        for width in (model.ffn_hidden_size, model.shared_expert_hidden_size)
    )
    width = model.expert_hidden_size // etp
    experts = stage.moe * (model.experts // ep) * aligned(2 * hidden * width, hidden * width)
    tables = stage.first + stage.last - (model.tied_head and stage.first and stage.last)
    total = stage.layers * attention + stage.dense * feed_forward
    total += stage.moe * (shared + aligned(model.experts * hidden))
    total += tables * aligned(model.vocab_size * hidden // tp) + stage.last * aligned(hidden)
    return (total, experts) if separate_experts(ep, etp, tp) else (total + experts, 0)


def active_weights(model: ModelConfig) -> dict[str, int]:
    """Weights that one token passes through in all layers, by module in the words of recompute."""
    dense = min(model.dense_layers, model.layers)
    moe = model.layers - dense
    up = model.layers * up_weights(model)
    return {
        "attention": model.layers * attention_weights(model) - up,
        **({"mla_up_proj": up} if model.mla.is_used else {}),
        "mlp": dense * 3 * model.hidden_size * model.ffn_hidden_size,
        "shared_experts": moe * 3 * model.hidden_size * model.shared_expert_hidden_size,
        "moe": moe * (model.experts_per_token * expert_weights(model) + model.hidden_size * model.experts),
    }


def last_layer_weights(model: ModelConfig) -> dict[str, int]:
    """Those of `active_weights` that lie behind the attention of the last layer, its output projection with
    them; empty where the clean rows stay to the end: with model.mla, and in HybridModel."""
    if model.mla.is_used or model.core is Core.hybrid:
        return {}
    last = active_weights(replace(model, layers=1, dense_layers=int(not model.has_experts)))
    return last | {"attention": model.heads * model.head_dim * model.hidden_size}


def before(model: ModelConfig) -> tuple[dict[str, int], int]:
    """Weights and FLOPs of a pair in a pass before a step's own: all layers'."""
    return active_weights(model), pair_flops(model)


def coarse(model: ModelConfig) -> Coarse | None:
    """None: each token passes all layers."""
    return None


def watched(model: ModelConfig) -> Watched:
    """Embedding, layers, and the head with the last norm."""
    layers = [f"layer {number}" for number in range(1, model.layers + 1)]
    others = {"embedding": "embedding", "decoder": "head", "output_layer": "head"}
    return Watched(["embedding", *layers, "head"], {"decoder": "layer"}, others)


def expert_weights(model: ModelConfig) -> int:
    """Of one routed expert."""
    return 3 * model.hidden_size * model.expert_hidden_size
