"""Which tensor is which: one table per family of Hugging Face checkpoints, read in both directions.

Our names are the keys of megatron-core's sharded state. fc1 holds the gate's rows, then those of `up`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from llada_megatron.checkpoint.shards import Part, whole
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.mapping import Entry, HeadGroups, expert_rows, rows


class ExpertLayout(StrEnum):
    """How a checkpoint holds experts: a matrix each (published), or stacked (what dFactory trains on)."""

    separate = "separate"
    stacked = "stacked"


class Table(Protocol):
    """A family's entries, in the order in which tensors are written."""

    def __call__(self, model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]: ...


@dataclass(frozen=True)
class Family:
    """A family of architectures whose tensors have the same names."""

    table: Table
    architectures: tuple[str, ...]


def _copy(ours: str, theirs: str, *shape: int) -> Entry:
    return Entry(whole(ours, *shape), (whole(theirs, *shape),))


def _feed_forward(ours: str, theirs: str, hidden: int, width: int) -> Iterator[Entry]:
    for first, projection in ((0, "gate_proj"), (width, "up_proj")):
        source = whole(f"{theirs}.{projection}.weight", width, hidden)
        yield Entry(rows(f"{ours}.linear_fc1.weight", (2 * width, hidden), first, width), (source,))
    yield _copy(f"{ours}.linear_fc2.weight", f"{theirs}.down_proj.weight", hidden, width)


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


def bailing_table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """BailingMoeV2 (Ling 2.0) and LLaDA2: MoE, QK-norm, and rows [all Q | all K | all V] in one tensor."""
    H, D, V = model.hidden_size, model.head_dim, model.vocab_size
    heads = HeadGroups(model.heads, model.kv_heads, D)
    qkv_rows = (model.heads + 2 * model.kv_heads) * D
    yield _copy("embedding.word_embeddings.weight", "model.word_embeddings.weight", V, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, source = f"{ours}.self_attention", f"{theirs}.attention"
        yield _copy(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", H)
        fused = whole(f"{source}.query_key_value.weight", qkv_rows, H)
        yield Entry(whole(f"{attention}.linear_qkv.weight", qkv_rows, H), (fused,), heads)
        if model.qk_norm:
            yield _copy(f"{attention}.q_layernorm.weight", f"{source}.query_layernorm.weight", D)
            yield _copy(f"{attention}.k_layernorm.weight", f"{source}.key_layernorm.weight", D)
        yield _copy(f"{attention}.linear_proj.weight", f"{source}.dense.weight", H, model.heads * D)
        dense = layer < model.dense_layers
        norm = f"{ours}.mlp.linear_fc1.layer_norm_weight" if dense else f"{ours}.pre_mlp_layernorm.weight"
        yield _copy(norm, f"{theirs}.post_attention_layernorm.weight", H)
        if dense:
            yield from _feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, model.ffn_hidden_size)
            continue
        yield _copy(f"{ours}.mlp.router.weight", f"{theirs}.mlp.gate.weight", model.experts, H)
        if model.expert_bias:
            yield _copy(f"{ours}.mlp.router.expert_bias", f"{theirs}.mlp.gate.expert_bias", model.experts)
        yield from _experts(f"{ours}.mlp.experts.experts", f"{theirs}.mlp.experts", model, layout)
        if width := model.shared_expert_hidden_size:
            yield from _feed_forward(f"{ours}.mlp.shared_experts", f"{theirs}.mlp.shared_experts", H, width)
    yield from _end(model)


def llama_table(model: ModelConfig, layout: ExpertLayout) -> Iterator[Entry]:
    """Llama and its relatives without experts or QK-norm: separate projections of Q, K and V."""
    H, D = model.hidden_size, model.head_dim
    heads = HeadGroups(model.heads, model.kv_heads, D)
    counts = {"q": model.heads * D, "k": model.kv_heads * D, "v": model.kv_heads * D}
    yield _copy("embedding.word_embeddings.weight", "model.embed_tokens.weight", model.vocab_size, H)
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}", f"model.layers.{layer}"
        attention, source = f"{ours}.self_attention", f"{theirs}.self_attn"
        yield _copy(f"{attention}.linear_qkv.layer_norm_weight", f"{theirs}.input_layernorm.weight", H)
        parts = tuple(whole(f"{source}.{name}_proj.weight", count, H) for name, count in counts.items())
        yield Entry(whole(f"{attention}.linear_qkv.weight", sum(counts.values()), H), parts, heads)
        yield _copy(f"{attention}.linear_proj.weight", f"{source}.o_proj.weight", H, model.heads * D)
        norm = f"{theirs}.post_attention_layernorm.weight"
        yield _copy(f"{ours}.mlp.linear_fc1.layer_norm_weight", norm, H)
        yield from _feed_forward(f"{ours}.mlp", f"{theirs}.mlp", H, model.ffn_hidden_size)
    yield from _end(model)


def _end(model: ModelConfig) -> Iterator[Entry]:
    yield _copy("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size)
    if not model.tied_head:
        yield _copy("output_layer.weight", "lm_head.weight", model.vocab_size, model.hidden_size)


def drop_reason(name: str, model: ModelConfig, described: dict[str, Any]) -> str | None:
    """Why a source tensor is left out, by its config.json; None for one that must be used."""
    if name == "lm_head.weight" and model.tied_head:
        return "the head is tied to the embedding"
    if name.endswith(".rotary_emb.inv_freq"):
        return "follows from config.json"
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and model.layers <= int(layer[1]) < model.layers + (described.get(PREDICTION_LAYERS) or 0):
        return "multi-token prediction layer, which diffusion does not use"
    return None


PREDICTION_LAYERS = "num_nextn_predict_layers"
"""In config.json of Ling 2.0: how many layers after the last one predict further tokens."""

BAILING = Family(bailing_table, ("BailingMoeV2ForCausalLM", "LLaDA2MoeModelLM"))
LLAMA = Family(llama_table, ("LlamaForCausalLM",))
FAMILIES = {architecture: family for family in (BAILING, LLAMA) for architecture in family.architectures}


def family_of(architecture: str, where: Any) -> Family:
    """The family of an architecture; BadInput naming those that are served."""
    if architecture not in FAMILIES:
        raise BadInput(
            f"{where} is of architecture {architecture}, which is not served: {', '.join(FAMILIES)} are."
        )
    return FAMILIES[architecture]
