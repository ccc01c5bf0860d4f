"""Llama and its relatives without experts or QK-norm: separate projections of Q, K and V.

`table` serves all families whose tensors are named like Llama's, with what a model has besides.
"""

from __future__ import annotations

from collections.abc import Iterator

from llada_megatron.checkpoint.shards import whole
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families.family import ExpertLayout, Family, Row
from llada_megatron.convert.families.forward import Forward
from llada_megatron.convert.families.shared import ROWS, all_dense, head_dim, last_tensors, never_needed
from llada_megatron.convert.mapping import Entry, HeadGroups, expert_rows, feed_forward, same
from llada_megatron.convert.rope_json import RotaryDefaults

ARCHITECTURE = "LlamaForCausalLM"


def table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """Separate projections of Q, K and V; biases, norms of heads and experts where a model has them."""
    H = model.hidden_size
    yield same("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        yield from _attention(f"{ours}.self_attention", theirs, model)
        norm = f"{theirs}.post_attention_layernorm.weight"
        if layer < model.dense_layers:
            yield same(f"{ours}.mlp.linear_fc1.layer_norm_weight", norm, H)
            yield from feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, model.ffn_hidden_size)
            continue
        yield same(f"{ours}.pre_mlp_layernorm.weight", norm, H)
        yield same(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", model.experts, H)
        yield from experts(f"{ours}.mlp.experts.experts", f"{theirs}.mlp.experts", model)
    yield from last_tensors(model)


def _attention(ours: str, layer: str, model: ModelConfig) -> Iterator[Entry]:
    H, D, source = model.hidden_size, model.head_dim, f"{layer}.self_attn"
    heads = HeadGroups(model.heads, model.kv_heads, D)
    counts = {"q": model.heads * D, "k": model.kv_heads * D, "v": model.kv_heads * D}
    rows = sum(counts.values())
    yield same(f"{ours}.linear_qkv.layer_norm_weight", f"{layer}.input_layernorm.weight", H)
    parts = tuple(whole(f"{source}.{name}_proj.weight", count, H) for name, count in counts.items())
    yield Entry(whole(f"{ours}.linear_qkv.weight", rows, H), parts, heads)
    if model.qkv_bias:
        parts = tuple(whole(f"{source}.{name}_proj.bias", count) for name, count in counts.items())
        yield Entry(whole(f"{ours}.linear_qkv.bias", rows), parts, heads)
    if model.qk_norm:
        for name in "qk":
            yield same(f"{ours}.{name}_layernorm.weight", f"{source}.{name}_norm.weight", D)
    yield same(f"{ours}.linear_proj.weight", f"{source}.o_proj.weight", H, model.heads * D)


def experts(ours: str, theirs: str, model: ModelConfig) -> Iterator[Entry]:
    """Three matrices of each expert, every one a tensor of theirs."""
    E, H, W = model.experts, model.hidden_size, model.expert_hidden_size
    fc1, fc2 = f"{ours}.linear_fc1.weight", f"{ours}.linear_fc2.weight"
    for expert in range(E):
        for first, projection in ((0, "gate_proj"), (W, "up_proj")):
            source = whole(f"{theirs}.{expert}.{projection}.weight", W, H)
            yield Entry(expert_rows(fc1, (E, 2 * W, H), expert, first, W), (source,))
        source = whole(f"{theirs}.{expert}.down_proj.weight", H, W)
        yield Entry(expert_rows(fc2, (E, H, W), expert, 0, H), (source,))


FAMILY = Family(
    architectures={ARCHITECTURE: {"model_type": "llama"}},
    experts=False,
    always={"qk_norm": False, "qkv_bias": False},
    rows=(
        *ROWS,
        Row("num_key_value_heads", "kv_heads", lambda said: said["num_attention_heads"]),
        Row("head_dim", "head_dim", head_dim),
    ),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    rotary=RotaryDefaults(base={ARCHITECTURE: 10000.0}, fraction={ARCHITECTURE: 1.0}, whole_head=True),
    fields=all_dense,
    table=table,
    drop_reason=never_needed,
    reference=lambda files, config: Forward(files, config).logits,
)
