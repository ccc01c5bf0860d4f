"""LLaDA: models from scratch that fill masks with full attention, a dense one under names of its own, and
LLaDA-MoE under those of Qwen3-MoE, with a router that does not normalise the weights of a token's experts.

The certificate compares causal logits, which say as much about the weights as those of full attention.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from llada_megatron.checkpoint.shards import whole
from llada_megatron.config.choices import ExpertScore, RotaryScaling
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families import llama
from llada_megatron.convert.families.family import ExpertLayout, Family, Row
from llada_megatron.convert.families.forward import Forward
from llada_megatron.convert.families.qwen import QwenForward
from llada_megatron.convert.families.shared import ROWS, head_dim, never_needed
from llada_megatron.convert.mapping import Entry, HeadGroups, rows, same
from llada_megatron.convert.rope_json import RotaryDefaults

ARCHITECTURE, MOE_ARCHITECTURE = "LLaDAModelLM", "LLaDAMoEModelLM"
STATED = ("block_type", "activation_type", "layer_norm_type", "include_bias", "rope", "weight_tying")
"""Keys that config.json has to say: the public code takes another model's where they are absent."""
MOE_LAYERS = "moe_layer_freq"
TOP = "model.transformer"
KEYS = {
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "weight_tying": "tie_word_embeddings",
}
"""Keys of config.json, and what Forward calls them."""
NAMES = {
    "model.embed_tokens": f"{TOP}.wte",
    "model.norm": f"{TOP}.ln_f",
    "lm_head": f"{TOP}.ff_out",
    "model.layers": f"{TOP}.blocks",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "self_attn.o_proj": "attn_out",
    "self_attn.": "",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
"""Parts of names of tensors likewise."""


def table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """LLaDA: `ff_proj` is the gate, `ff_out` the way back of a layer and, outside of them, the head."""
    H, D, F = model.hidden_size, model.head_dim, model.ffn_hidden_size
    heads = HeadGroups(model.heads, model.kv_heads, D)
    counts = {"q": model.heads * D, "k": model.kv_heads * D, "v": model.kv_heads * D}
    yield same("embedding.word_embeddings.weight", f"{TOP}.wte.weight", model.vocab_size, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"{TOP}.blocks.{layer}"
        attention = f"{ours}.self_attention"
        yield same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.attn_norm.weight", H)
        parts = tuple(whole(f"{theirs}.{name}_proj.weight", count, H) for name, count in counts.items())
        yield Entry(whole(f"{attention}.linear_qkv.weight", sum(counts.values()), H), parts, heads)
        yield same(f"{attention}.linear_proj.weight", f"{theirs}.attn_out.weight", H, model.heads * D)
        yield same(f"{ours}.mlp.linear_fc1.layer_norm_weight", f"{theirs}.ff_norm.weight", H)
        for first, name in ((0, "ff_proj"), (F, "up_proj")):
            part = rows(f"{ours}.mlp.linear_fc1.weight", (2 * F, H), first, F)
            yield Entry(part, (whole(f"{theirs}.{name}.weight", F, H),))
        yield same(f"{ours}.mlp.linear_fc2.weight", f"{theirs}.ff_out.weight", H, F)
    yield same("decoder.final_layernorm.weight", f"{TOP}.ln_f.weight", H)
    if not model.tied_head:
        yield same("output_layer.weight", f"{TOP}.ff_out.weight", model.vocab_size, H)


def fields(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What no row says; BadInput where config.json leaves out what tells one kind of layer from another,
    or says what the public code does not compute.
    """
    for key in STATED:
        if key not in described:
            raise BadInput(f"it has no '{key}', without which the public code builds another model.")
    scaling = values["rotary_scaling"].type
    if scaling is not RotaryScaling.none:
        raise BadInput(
            f"it scales rotary frequencies ({scaling}), which the code of {ARCHITECTURE} does not read:"
            " take it out."
        )
    return {"dense_layers": values["layers"], "head_dim": values["hidden_size"] // max(values["heads"], 1)}


def keys(model: ModelConfig, carried: dict[str, Any]) -> dict[str, Any]:
    """A new config.json says the rows of the embedding twice."""
    return {} if carried else {"vocab_size": model.vocab_size}


def require(model: ModelConfig, architecture: str) -> None:
    """Raise BadInput for heads of another width, and longer contexts, which LLaDA's code does not know."""
    if model.head_dim * model.heads != model.hidden_size:
        raise BadInput(
            f"{architecture} has heads of model.hidden_size / model.heads channels, not {model.head_dim}."
        )
    if architecture == ARCHITECTURE and model.rotary_scaling.type is not RotaryScaling.none:
        raise BadInput(
            f"{architecture} scales no rotary frequencies, and this model has"
            f" model.rotary_scaling.type={model.rotary_scaling.type}."
        )


class LladaForward(Forward):
    """Logits of LLaDA: a Llama's, read under other names of tensors and of what config.json says."""

    def __init__(self, files: Any, config: dict[str, Any]) -> None:
        super().__init__(files, config | {here: config.get(there) for there, here in KEYS.items()})

    def get(self, name: str) -> Tensor:
        for usual, theirs in NAMES.items():
            name = name.replace(usual, theirs)
        return super().get(name)


def moe_fields(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Which layers have experts; BadInput where one without comes after one with."""
    said = described.get(MOE_LAYERS)
    dense = said.count(0) if isinstance(said, list) else 0
    if said != [0] * dense + [1] * (values["layers"] - dense) or dense == values["layers"]:
        raise BadInput(
            f"{MOE_LAYERS}={said}: served are {values['layers']} numbers, 0 for the first layers that have no"
            " experts, then 1."
        )
    return {"dense_layers": dense}


def moe_keys(model: ModelConfig, carried: dict[str, Any]) -> dict[str, Any]:
    """The same on the way out."""
    return {MOE_LAYERS: [0] * model.dense_layers + [1] * (model.layers - model.dense_layers)}


def _auto_map(module: str, causal: str) -> dict[str, str]:
    model = f"modeling_{module}.{causal}"
    config = f"configuration_{module}.LLaDAConfig"
    return {"AutoConfig": config, "AutoModel": model, "AutoModelForCausalLM": model}


def _rotary(architecture: str) -> RotaryDefaults:
    return RotaryDefaults({architecture: 10000.0}, {architecture: 1.0}, whole_head=True)


FAMILY = Family(
    architectures={
        ARCHITECTURE: {"model_type": "llada", "auto_map": _auto_map("llada", ARCHITECTURE)},
    },
    blocks={ARCHITECTURE: 0},
    after_diffusion=ARCHITECTURE,
    experts=False,
    always={"qk_norm": False, "qkv_bias": False},
    longest="max_sequence_length",
    rows=(
        Row("embedding_size", "vocab_size", lambda said: said.get("vocab_size")),
        Row("n_layers", "layers"),
        Row("d_model", "hidden_size"),
        Row("n_heads", "heads"),
        Row("n_kv_heads", "kv_heads", lambda said: said["n_heads"]),
        Row("mlp_hidden_size", "ffn_hidden_size"),
        Row("rms_norm_eps", "norm_eps"),
        Row("weight_tying", "tied_head"),
        Row("init_std", "init_std", 0.02),
    ),
    fixed={
        "activation_type": "silu",
        "attention_layer_norm": False,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "multi_query_attention": None,
        "rope": True,
        "scale_logits": False,
    },
    also_written={
        "alibi": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "rope_full_precision": True,
    },
    rotary=_rotary(ARCHITECTURE),
    idle=frozenset(
        {
            *("alibi_bias_max", "attention_layer_norm_with_affine", "auto_map", "flash_attention"),
            *("flash_attn_varlen", "init_cutoff_factor", "init_device", "init_fn", "max_sequence_length"),
            *("mlp_ratio", "precision", "vocab_size"),
        }
    ),
    fields=fields,
    keys=keys,
    require=require,
    table=table,
    drop_reason=never_needed,
    reference=lambda files, config: LladaForward(files, config).logits,
)
MOE = Family(
    architectures={
        MOE_ARCHITECTURE: {"model_type": "llada", "auto_map": _auto_map("lladamoe", MOE_ARCHITECTURE)},
    },
    blocks={MOE_ARCHITECTURE: 0},
    after_diffusion=MOE_ARCHITECTURE,
    experts=True,
    always={
        "qkv_bias": False,
        "expert_score": ExpertScore.softmax,
        "normalize_expert_weights": False,
        "expert_bias": False,
        "expert_groups": 1,
        "routed_scaling_factor": 1.0,
        "shared_expert_hidden_size": 0,
    },
    rows=(
        *(row for row in ROWS if row.ours not in ("ffn_hidden_size", "norm_eps")),
        Row("dense_intermediate_size", "ffn_hidden_size"),
        Row("rms_norm_eps", "norm_eps", 1e-5),
        Row("num_key_value_heads", "kv_heads", lambda said: said["num_attention_heads"]),
        Row("num_experts", "experts"),
        Row("num_experts_per_tok", "experts_per_token"),
        Row("expert_intermediate_size", "expert_hidden_size"),
        Row("qk_layernorm", "qk_norm"),
    ),
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "norm_topk_prob": False,
        "routed_scaling_factor": 1,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "shared_expert_intermediate_size": None,
        "router_num_group": None,
        "router_topk_group": None,
    },
    rotary=_rotary(MOE_ARCHITECTURE),
    idle=frozenset({MOE_LAYERS, "auto_map", "router_aux_loss_coef"}),
    fields=lambda described, values: moe_fields(described, values) | {"head_dim": head_dim(described)},
    keys=moe_keys,
    require=require,
    table=llama.table,
    drop_reason=never_needed,
    reference=lambda files, config: QwenForward(files, config).logits,
)
