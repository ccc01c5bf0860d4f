"""DeepSeek-V3: latent attention, a shared expert, and experts that are chosen by groups of biased sigmoids.

Rows of all projections lie as megatron-core's do, so that every tensor is the same on both sides. Rotated
channels are neighbours in pairs (`rope_interleave`), which its layer of latent attention expects too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llada_megatron.config.choices import ExpertScore
from llada_megatron.config.errors import BadInput
from llada_megatron.config.mla import MlaConfig
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families.bailing import BailingForward
from llada_megatron.convert.families.family import ExpertLayout, Family, Row
from llada_megatron.convert.families.llama import experts
from llada_megatron.convert.families.rotation import rotated
from llada_megatron.convert.families.shared import (
    PREDICTION_LAYERS,
    ROWS,
    is_of_prediction,
    last_tensors,
    never_needed,
    require_same_groups,
)
from llada_megatron.convert.mapping import Entry, feed_forward, same
from llada_megatron.convert.reference_files import ReferenceFiles
from llada_megatron.convert.rope_json import RotaryDefaults

ARCHITECTURE = "DeepseekV3ForCausalLM"
WIDTHS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
"""Keys of config.json that are fields of model.mla."""
SHARED = "n_shared_experts"


def table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """Every tensor of the layers, without those that predict further tokens."""
    H = model.hidden_size
    yield same("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield same(f"{ours}.input_layernorm.weight", f"{theirs}.input_layernorm.weight", H)
        yield from _attention(f"{ours}.self_attention", f"{theirs}.self_attn", model)
        norm = f"{theirs}.post_attention_layernorm.weight"
        if layer < model.dense_layers:
            yield same(f"{ours}.mlp.linear_fc1.layer_norm_weight", norm, H)
            yield from feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, model.ffn_hidden_size)
            continue
        yield same(f"{ours}.pre_mlp_layernorm.weight", norm, H)
        yield same(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", model.experts, H)
        bias = f"{theirs}.mlp.gate.e_score_correction_bias"
        yield same(f"{ours}.mlp.router.expert_bias", bias, model.experts)
        yield from experts(f"{ours}.mlp.experts.experts", f"{theirs}.mlp.experts", model)
        if width := model.shared_expert_hidden_size:
            yield from feed_forward(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts", H, width)
    yield from last_tensors(model)


def _attention(ours: str, theirs: str, model: ModelConfig) -> Iterator[Entry]:
    H, heads, mla = model.hidden_size, model.heads, model.mla
    queries, latent = heads * model.head_dim, mla.kv_lora_rank
    if rank := mla.q_lora_rank:
        yield same(f"{ours}.linear_q_down_proj.weight", f"{theirs}.q_a_proj.weight", rank, H)
        yield same(f"{ours}.q_layernorm.weight", f"{theirs}.q_a_layernorm.weight", rank)
        yield same(f"{ours}.linear_q_up_proj.weight", f"{theirs}.q_b_proj.weight", queries, rank)
    else:
        yield same(f"{ours}.linear_q_proj.weight", f"{theirs}.q_proj.weight", queries, H)
    joined = latent + mla.qk_rope_head_dim
    yield same(f"{ours}.linear_kv_down_proj.weight", f"{theirs}.kv_a_proj_with_mqa.weight", joined, H)
    yield same(f"{ours}.kv_layernorm.weight", f"{theirs}.kv_a_layernorm.weight", latent)
    rows = heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    yield same(f"{ours}.linear_kv_up_proj.weight", f"{theirs}.kv_b_proj.weight", rows, latent)
    yield same(f"{ours}.linear_proj.weight", f"{theirs}.o_proj.weight", H, heads * mla.v_head_dim)


def drop_reason(name: str, model: ModelConfig, described: dict[str, Any]) -> str | None:
    """Beside what no family needs, layers that predict further tokens."""
    return is_of_prediction(name, model, described) or never_needed(name, model, described)


def fields(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Latents and the shared experts' width; BadInput where groups of experts are chosen otherwise."""
    require_same_groups(
        values["expert_groups"], values["expert_groups_per_token"], values["experts_per_token"]
    )
    if missing := [name for name in (*WIDTHS, SHARED) if name not in described]:
        raise BadInput(f"there is no {', '.join(missing)}.")
    mla = MlaConfig(**{name: described[name] or 0 for name in WIDTHS})
    if not mla.is_used:
        raise BadInput(f"kv_lora_rank={described['kv_lora_rank']} must be above 0.")
    return {
        "mla": mla,
        "head_dim": mla.qk_nope_head_dim + mla.qk_rope_head_dim,
        "shared_expert_hidden_size": values["expert_hidden_size"] * (described[SHARED] or 0),
    }


def keys(model: ModelConfig, carried: dict[str, Any]) -> dict[str, Any]:
    """The same on the way out, and no layers for prediction, since they were left out."""
    sizes: dict[str, int | None] = {name: getattr(model.mla, name) for name in WIDTHS}
    sizes["q_lora_rank"] = sizes["q_lora_rank"] or None
    sizes[SHARED] = model.shared_expert_hidden_size // model.expert_hidden_size or None
    said = {key for key, size in sizes.items() if key in carried and (carried[key] or None) == size}
    written = {key: size for key, size in sizes.items() if key not in said}
    return written | ({PREDICTION_LAYERS: 0} if carried.get(PREDICTION_LAYERS) else {})


def require(model: ModelConfig, architecture: str) -> None:
    """Raise BadInput for a model that the public code would compute otherwise, or cannot."""
    require_same_groups(model.expert_groups, model.expert_groups_per_token, model.experts_per_token)
    if model.expert_capacity:
        raise BadInput(
            f"{architecture} knows no pools of experts and the model has model.expert_capacity="
            f"{model.expert_capacity}: choose another --architecture."
        )
    if model.shared_expert_hidden_size % model.expert_hidden_size:
        raise BadInput(
            f"{architecture} has shared experts of a multiple of the experts' width"
            f" {model.expert_hidden_size}, not {model.shared_expert_hidden_size}."
        )


class DeepseekForward(BailingForward):
    """Logits of DeepSeek-V3. Dn, Dr and Dv are a head's channels without and with positions, and values."""

    embedding, attention, output = "model.embed_tokens", "self_attn", "o_proj"
    expert_bias = "gate.e_score_correction_bias"

    def __init__(self, files: ReferenceFiles, config: dict[str, Any]) -> None:
        super().__init__(files, config | {"head_dim": config["qk_rope_head_dim"]})

    def _attend(self, name: str, normed_SH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        config, S = self.config, len(normed_SH)
        Dn, Dr, Dv = (config[key] for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
        if config.get("q_lora_rank"):
            latent = self.norm(f"{name}.q_a_layernorm", normed_SH @ self.get(f"{name}.q_a_proj.weight").T)
            query = latent @ self.get(f"{name}.q_b_proj.weight").T
        else:
            query = normed_SH @ self.get(f"{name}.q_proj.weight").T
        query = query.unflatten(-1, (-1, Dn + Dr))
        joined = normed_SH @ self.get(f"{name}.kv_a_proj_with_mqa.weight").T
        latent, shared_key = joined.split([config["kv_lora_rank"], Dr], dim=-1)
        latent = self.norm(f"{name}.kv_a_layernorm", latent)
        keys_values = (latent @ self.get(f"{name}.kv_b_proj.weight").T).unflatten(-1, (-1, Dn + Dv))
        scores = torch.einsum("shd,thd->hst", query[..., :Dn], keys_values[..., :Dn])
        turned = rotated(_halves(query[..., Dn:]), cos, sin), rotated(_halves(shared_key[:, None]), cos, sin)
        scores = (scores + torch.einsum("shd,td->hst", turned[0], turned[1][:, 0])) * self._softmax_scale()
        later = torch.ones(S, S, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed_SHD = torch.einsum("hst,thd->shd", weights, keys_values[..., Dn:])
        return mixed_SHD.flatten(1) @ self.get(f"{name}.o_proj.weight").T

    def _softmax_scale(self) -> float:
        config = self.config
        scale = (config["qk_nope_head_dim"] + config["qk_rope_head_dim"]) ** -0.5
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        if (rope.get("rope_type") or rope.get("type")) != "yarn":
            return scale
        return scale * (0.1 * (rope.get("mscale_all_dim") or 0) * math.log(rope["factor"]) + 1) ** 2


def _halves(heads: Tensor) -> Tensor:
    """Channels whose pairs are neighbours, ordered so that pair i is channels i and i + width / 2."""
    return torch.cat([heads[..., 0::2], heads[..., 1::2]], dim=-1)


FAMILY = Family(
    architectures={ARCHITECTURE: {"model_type": "deepseek_v3"}},
    experts=True,
    latents=True,
    always={
        "qk_norm": True,
        "qkv_bias": False,
        "expert_score": ExpertScore.sigmoid,
        "normalize_expert_weights": True,
        "expert_bias": True,
    },
    rows=(
        *ROWS,
        Row("num_key_value_heads", "kv_heads", lambda said: said["num_attention_heads"]),
        Row("first_k_dense_replace", "dense_layers"),
        Row("n_routed_experts", "experts"),
        Row("num_experts_per_tok", "experts_per_token"),
        Row("moe_intermediate_size", "expert_hidden_size"),
        Row("n_group", "expert_groups"),
        Row("topk_group", "expert_groups_per_token"),
        Row("routed_scaling_factor", "routed_scaling_factor"),
    ),
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    rotary=RotaryDefaults(
        base={ARCHITECTURE: 10000.0}, fraction={ARCHITECTURE: 1.0}, whole_head=True, scales_softmax=True
    ),
    counts=(*WIDTHS, SHARED, PREDICTION_LAYERS),
    idle=frozenset({"auto_map", "aux_loss_alpha", "ep_size", "head_dim", "qk_head_dim", "seq_aux"}),
    left_behind=frozenset({PREDICTION_LAYERS}),
    fields=fields,
    keys=keys,
    require=require,
    table=table,
    drop_reason=drop_reason,
    reference=lambda files, config: DeepseekForward(files, config).logits,
)
