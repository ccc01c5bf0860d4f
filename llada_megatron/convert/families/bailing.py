"""BailingMoeV2 (Ling 2.0) and LLaDA2: a Mixture of Experts with QK-norm and grouped routing."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llada_megatron.checkpoint.shards import Part, whole
from llada_megatron.config.choices import ExpertScore
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families.family import ExpertLayout, Family, Row
from llada_megatron.convert.families.forward import PROJECTIONS, Forward
from llada_megatron.convert.families.shared import (
    BLOCK_SIZE,
    PREDICTION_LAYERS,
    ROWS,
    head_dim,
    is_of_prediction,
    last_tensors,
    never_needed,
    require_same_groups,
)
from llada_megatron.convert.mapping import Entry, HeadGroups, expert_rows, feed_forward, same
from llada_megatron.convert.rope_json import RotaryDefaults

AUTOREGRESSIVE, DIFFUSION = "BailingMoeV2ForCausalLM", "LLaDA2MoeModelLM"
CAPACITY = "expert_capacity"
"""In config.json of LLaDA2.2, as SGLang reads it: experts that the tokens of a block choose from."""
LLADA2_BLOCK = 32
"""Of LLaDA2.0's last stage (arXiv 2512.15745), which its config.json does not say."""
NO_PREDICTION = {PREDICTION_LAYERS: 0, "mtp_loss_scaling_factor": 0}


def table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """BailingMoeV2 (Ling 2.0) and LLaDA2: MoE, QK-norm, and rows [all Q | all K | all V] in one tensor."""
    H, D, V = model.hidden_size, model.head_dim, model.vocab_size
    heads = HeadGroups(model.heads, model.kv_heads, D)
    qkv_rows = (model.heads + 2 * model.kv_heads) * D
    yield same("embedding.word_embeddings.weight", "model.word_embeddings.weight", V, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, source = f"{ours}.self_attention", f"{theirs}.attention"
        yield same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", H)
        fused = whole(f"{source}.query_key_value.weight", qkv_rows, H)
        yield Entry(whole(f"{attention}.linear_qkv.weight", qkv_rows, H), (fused,), heads)
        if model.qk_norm:
            yield same(f"{attention}.q_layernorm.weight", f"{source}.query_layernorm.weight", D)
            yield same(f"{attention}.k_layernorm.weight", f"{source}.key_layernorm.weight", D)
        yield same(f"{attention}.linear_proj.weight", f"{source}.dense.weight", H, model.heads * D)
        dense = layer < model.dense_layers
        norm = f"{ours}.mlp.linear_fc1.layer_norm_weight" if dense else f"{ours}.pre_mlp_layernorm.weight"
        yield same(norm, f"{theirs}.post_attention_layernorm.weight", H)
        if dense:
            yield from feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, model.ffn_hidden_size)
            continue
        yield same(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", model.experts, H)
        if model.expert_bias:
            yield same(f"{ours}.mlp.router.expert_bias", f"{theirs}.mlp.gate.expert_bias", model.experts)
        yield from _experts(f"{ours}.mlp.experts.experts", f"{theirs}.mlp.experts", model, layout)
        if width := model.shared_expert_hidden_size:
            yield from feed_forward(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts", H, width)
    yield from last_tensors(model)


def _experts(ours: str, theirs: str, model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    E, H, W = model.experts, model.hidden_size, model.expert_hidden_size

    def source(expert: int, projection: str, count: int, columns: int) -> tuple[Part]:
        if layout is ExpertLayout.stacked:
            return (expert_rows(f"{theirs}.{projection}", (E, count, columns), expert, 0, count),)
        return (whole(f"{theirs}.{expert}.{projection}.weight", count, columns),)

    fc1, fc2 = f"{ours}.linear_fc1.weight", f"{ours}.linear_fc2.weight"
    for expert in range(E):
        for first, projection in ((0, "gate_proj"), (W, "up_proj")):
            yield Entry(expert_rows(fc1, (E, 2 * W, H), expert, first, W), source(expert, projection, W, H))
        yield Entry(expert_rows(fc2, (E, H, W), expert, 0, H), source(expert, "down_proj", H, W))


def drop_reason(name: str, model: ModelConfig, described: dict[str, Any]) -> str | None:
    """Beside what no family needs, layers that predict further tokens."""
    return is_of_prediction(name, model, described) or never_needed(name, model, described)


def fields(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """The shared experts' width and the pools; BadInput where groups of experts are chosen otherwise."""
    capacity = described.get(CAPACITY) or 0
    if not capacity:
        require_same_groups(
            values["expert_groups"], values["expert_groups_per_token"], values["experts_per_token"]
        )
    number = described.get("num_shared_experts") or 0
    return {
        "shared_expert_hidden_size": values["expert_hidden_size"] * number,
        "expert_capacity": capacity,
    }


def keys(model: ModelConfig, carried: dict[str, Any]) -> dict[str, Any]:
    """The number of shared experts, pools if any, and no layers for prediction, since they were left out."""
    number = {"num_shared_experts": model.shared_expert_hidden_size // model.expert_hidden_size}
    if model.expert_capacity or carried.get(CAPACITY):
        number[CAPACITY] = model.expert_capacity
    return number | (NO_PREDICTION if carried.get(PREDICTION_LAYERS) else {})


def require(model: ModelConfig, architecture: str) -> None:
    """Raise BadInput for a model that the public code would compute otherwise, or cannot."""
    if not model.expert_capacity:
        require_same_groups(model.expert_groups, model.expert_groups_per_token, model.experts_per_token)
    elif architecture != DIFFUSION:
        raise BadInput(
            f"{architecture} knows no pools of experts and the model has model.expert_capacity="
            f"{model.expert_capacity}: choose --architecture {DIFFUSION}."
        )
    if model.shared_expert_hidden_size % model.expert_hidden_size:
        raise BadInput(
            f"{architecture} has shared experts of a multiple of the experts' width"
            f" {model.expert_hidden_size}, not {model.shared_expert_hidden_size}."
        )
    if architecture == DIFFUSION and not model.qk_norm:
        raise BadInput(
            f"The public code of {DIFFUSION} always has QK-norm and this model has none:"
            f" choose --architecture {AUTOREGRESSIVE}."
        )


class BailingForward(Forward):
    """Logits of BailingMoeV2 and LLaDA2."""

    embedding, attention, output = "model.word_embeddings", "attention", "dense"
    expert_bias = "gate.expert_bias"

    def queries_keys_values(self, name: str, normed_SH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        joined = self.heads(normed_SH @ self.get(f"{name}.query_key_value.weight").T)
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        query, key, value = joined.split([heads, kv_heads, kv_heads], dim=1)
        if f"{name}.query_layernorm.weight" in self.files.tensors:
            query = self.norm(f"{name}.query_layernorm", query)
            key = self.norm(f"{name}.key_layernorm", key)
        return query, key, value

    def feed_forward(self, name: str, normed_SH: Tensor) -> Tensor:
        if f"{name}.gate.weight" not in self.files.tensors:
            return super().feed_forward(name, normed_SH)
        weights_SE = self._routing(name, normed_SH)
        output_SH = self.mixture(normed_SH, weights_SE, partial(self._expert, name))
        if f"{name}.shared_experts.gate_proj.weight" in self.files.tensors:
            output_SH = output_SH + super().feed_forward(f"{name}.shared_experts", normed_SH)
        return output_SH

    def _scale(self) -> float:
        absent = 2.5 if "llada2" in str(self.config.get("architectures")).lower() else 1.0
        return self.config.get("routed_scaling_factor", absent)

    def _expert(self, name: str, expert: int) -> tuple[Tensor, ...]:
        if f"{name}.experts.gate_proj" in self.files.tensors:
            return tuple(self._expert_of_stack(f"{name}.experts.{p}_proj", expert) for p in PROJECTIONS)
        return tuple(self.get(f"{name}.experts.{expert}.{p}_proj.weight") for p in PROJECTIONS)

    def _expert_of_stack(self, name: str, expert: int) -> Tensor:
        shape = self.files.tensors[name].shape
        return self.files.read(expert_rows(name, shape, expert, 0, shape[1]))[0].float()

    def _routing(self, name: str, normed_SH: Tensor) -> Tensor:
        """fp32 [S, E]: the combine weight of chosen experts, zero elsewhere.

        What is compared is causal, blocks of one token: its pool holds its own best experts.
        """
        config = self.config
        scores = (normed_SH @ self.get(f"{name}.gate.weight").T).sigmoid()
        biased = scores
        if f"{name}.{self.expert_bias}" in self.files.tensors:
            biased = scores + self.get(f"{name}.{self.expert_bias}")
        open_scores = biased
        if not config.get(CAPACITY):
            groups = biased.unflatten(-1, (config["n_group"], -1))
            best = (
                groups.topk(min(2, groups.shape[-1]), dim=-1)
                .values.sum(-1)
                .topk(config["topk_group"], dim=-1)
                .indices
            )
            closed = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, False)
            open_scores = groups.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        chosen = open_scores.topk(config["num_experts_per_tok"], dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * self._scale()
        return torch.zeros_like(scores).scatter(-1, chosen, weights)


FAMILY = Family(
    architectures={
        AUTOREGRESSIVE: {
            "model_type": "bailing_moe",
            "auto_map": {
                "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
                "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
                "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
            },
        },
        DIFFUSION: {
            "model_type": "llada2_moe",
            "auto_map": {
                "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
                "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
                "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
            },
        },
    },  # the .py files that auto_map names belong to the public repositories
    blocks={DIFFUSION: LLADA2_BLOCK},
    after_diffusion=DIFFUSION,
    experts=True,
    always={"qkv_bias": False, "expert_score": ExpertScore.sigmoid},
    rows=(
        *ROWS,
        Row("num_key_value_heads", "kv_heads"),
        Row("head_dim", "head_dim", head_dim),
        Row("first_k_dense_replace", "dense_layers"),
        Row("num_experts", "experts"),
        Row("num_experts_per_tok", "experts_per_token"),
        Row("moe_intermediate_size", "expert_hidden_size"),
        Row("n_group", "expert_groups"),
        Row("topk_group", "expert_groups_per_token"),
        Row("routed_scaling_factor", "routed_scaling_factor", {AUTOREGRESSIVE: 1.0, DIFFUSION: 2.5}),
        Row("moe_router_enable_expert_bias", "expert_bias"),
        Row("use_qk_norm", "qk_norm", True),
    ),
    fixed={
        "hidden_act": "silu",
        "use_bias": False,
        "use_qkv_bias": False,
        "use_sliding_window": False,
        "score_function": "sigmoid",
        "norm_topk_prob": True,
        "norm_head": False,
    },
    also_written={
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
        "router_dtype": "fp32",
    },
    rotary=RotaryDefaults(base={}, fraction={AUTOREGRESSIVE: 1.0, DIFFUSION: 0.5}),
    counts=("num_shared_experts", CAPACITY, BLOCK_SIZE, PREDICTION_LAYERS),
    idle=frozenset({"auto_map", "mtp_loss_scaling_factor", "sliding_window"}),
    left_behind=frozenset(NO_PREDICTION),
    fields=fields,
    keys=keys,
    says_block_size=lambda model, architecture: model.expert_capacity > 0,
    require=require,
    table=table,
    drop_reason=drop_reason,
    stacked_suffix=".mlp.experts.gate_proj",
    reference=lambda files, config: BailingForward(files, config).logits,
)
