"""What families have in common: rows of config.json, and the tensors around the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families.family import Row
from llada_megatron.convert.mapping import Entry, same

ROWS = (
    Row("vocab_size", "vocab_size"),
    Row("num_hidden_layers", "layers"),
    Row("hidden_size", "hidden_size"),
    Row("num_attention_heads", "heads"),
    Row("intermediate_size", "ffn_hidden_size"),
    Row("rms_norm_eps", "norm_eps"),
    Row("tie_word_embeddings", "tied_head", False),
    Row("initializer_range", "init_std", 0.02),
)


def last_tensors(model: ModelConfig) -> Iterator[Entry]:
    """The final norm, and the head where it is not the embedding."""
    yield same("decoder.final_layernorm.weight", "model.norm.weight", model.hidden_size)
    if not model.tied_head:
        yield same("output_layer.weight", "lm_head.weight", model.vocab_size, model.hidden_size)


def never_needed(name: str, model: ModelConfig, described: dict[str, Any]) -> str | None:
    """Why any family leaves a source tensor out; None for one that must be used."""
    if name == "lm_head.weight" and model.tied_head:
        return "the head is tied to the embedding"
    if name.endswith(".rotary_emb.inv_freq"):
        return "follows from config.json"
    return None
