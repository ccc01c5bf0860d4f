"""What families have in common: rows of config.json, and the tensors around the layers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from llada_megatron.config.errors import BadInput
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

BLOCK_SIZE = "block_size"
"""Of the blocks that a model was trained with and must be decoded in."""
IDLE = frozenset(
    [
        "architectures",
        "model_type",
        "torch_dtype",
        "dtype",
        "transformers_version",
        "_name_or_path",
        "use_cache",
        "pretraining_tp",
        "max_position_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "mask_token_id",
        "delete_token_id",
        "split_token_id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "max_window_layers",
        "return_dict",
        "quantization_config",
    ]
)
"""Keys that do not change what a model computes, in any family."""
IDLE_AT = {
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "output_dropout": 0.0,
    "hidden_dropout": 0.0,
    "router_dtype": "fp32",
    "use_rmsnorm": True,
}
"""Keys that say nothing at one value; what the public code makes of another one is not done here."""
ANOTHER_MODEL = {
    "rope_interleave": False,
    "rope_interleaved": False,
    "alibi": False,
    "clip_qkv": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "no_rope_layers": None,
}
"""Keys of relatives, and the value or null that changes nothing; a model with another one is refused."""


PREDICTION_LAYERS = "num_nextn_predict_layers"
"""In config.json of Ling 2.0 and DeepSeek-V3: how many layers after the last one predict further tokens."""


def head_dim(described: dict[str, Any]) -> int:
    """Of a config.json that does not say: the hidden size over the heads, which its reader has checked."""
    return described["hidden_size"] // max(described["num_attention_heads"], 1)


def all_dense(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Of families without experts."""
    return {"dense_layers": values["layers"]}


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


def is_of_prediction(name: str, model: ModelConfig, described: dict[str, Any]) -> str | None:
    """Why a tensor is left out that belongs to a layer which predicts further tokens; None for any other."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and model.layers <= int(layer[1]) < model.layers + (described.get(PREDICTION_LAYERS) or 0):
        return "multi-token prediction layer: rows of a block already see the tokens that it predicts"
    return None


def require_same_groups(groups: int, chosen: int, experts_per_token: int) -> None:
    """The public code scores a group by its best two experts, megatron-core by its best k / chosen groups."""
    if chosen < groups and experts_per_token != 2 * chosen:
        raise BadInput(
            f"megatron-core and the public code choose {experts_per_token} experts from {chosen} groups"
            f" in different ways: only {2 * chosen} experts per token, two per group, are served."
        )
