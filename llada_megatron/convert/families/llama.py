"""Llama and its relatives without experts or QK-norm: separate projections of Q, K and V."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llada_megatron.checkpoint.shards import whole
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families.family import ExpertLayout, Family, Row
from llada_megatron.convert.families.forward import Forward
from llada_megatron.convert.families.shared import ROWS, head_dim, last_tensors, never_needed
from llada_megatron.convert.mapping import Entry, HeadGroups, feed_forward, same
from llada_megatron.convert.rope_json import RotaryDefaults

ARCHITECTURE = "LlamaForCausalLM"


def table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """Llama and its relatives without experts or QK-norm: separate projections of Q, K and V."""
    H, D = model.hidden_size, model.head_dim
    heads = HeadGroups(model.heads, model.kv_heads, D)
    counts = {"q": model.heads * D, "k": model.kv_heads * D, "v": model.kv_heads * D}
    yield same("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, source = f"{ours}.self_attention", f"{theirs}.self_attn"
        yield same(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", H)
        parts = tuple(whole(f"{source}.{name}_proj.weight", count, H) for name, count in counts.items())
        yield Entry(whole(f"{attention}.linear_qkv.weight", sum(counts.values()), H), parts, heads)
        yield same(f"{attention}.linear_proj.weight", f"{source}.o_proj.weight", H, model.heads * D)
        norm = f"{theirs}.post_attention_layernorm.weight"
        yield same(f"{ours}.mlp.linear_fc1.layer_norm_weight", norm, H)
        yield from feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, model.ffn_hidden_size)
    yield from last_tensors(model)


def fields(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What every model of the family has."""
    return {"dense_layers": values["layers"], "qk_norm": False}


def require(model: ModelConfig, architecture: str) -> None:
    """Raise BadInput for a model with QK-norm or part of the head unrotated."""
    if model.qk_norm or model.rotary_fraction != 1.0:
        raise BadInput(
            f"{architecture} has no QK-norm and rotates the whole head; this model is built otherwise"
            " (model.qk_norm, model.rotary_fraction)."
        )


FAMILY = Family(
    architectures={ARCHITECTURE: {"model_type": "llama"}},
    experts=False,
    rows=(
        *ROWS,
        Row("num_key_value_heads", "kv_heads", lambda said: said["num_attention_heads"]),
        Row("head_dim", "head_dim", head_dim),
    ),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    rotary=RotaryDefaults(base={ARCHITECTURE: 10000.0}, fraction={ARCHITECTURE: 1.0}, whole_head=True),
    fields=fields,
    require=require,
    table=table,
    drop_reason=never_needed,
    reference=lambda files, config: Forward(files, config).logits,
)
