"""config.json and generation_config.json in both directions.

A row names a key of theirs, a field of ModelConfig and what the published model code takes where the key is
absent; FIXED holds what megatron-core is built to compute in one way only.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families import BAILING, LLAMA, PREDICTION_LAYERS, family_of

REQUIRED = object()
AUTOREGRESSIVE_MOE, DIFFUSION_MOE = BAILING.architectures
(DENSE,) = LLAMA.architectures


class Row(NamedTuple):
    theirs: str
    ours: str
    absent: Any = REQUIRED


SHARED_ROWS = (
    Row("vocab_size", "vocab_size"),
    Row("num_hidden_layers", "layers"),
    Row("hidden_size", "hidden_size"),
    Row("num_attention_heads", "heads"),
    Row("intermediate_size", "ffn_hidden_size"),
    Row("rms_norm_eps", "norm_eps"),
    Row("tie_word_embeddings", "tied_head", False),
    Row("initializer_range", "init_std", 0.02),
)
BAILING_ROWS = (
    *SHARED_ROWS,
    Row("num_key_value_heads", "kv_heads"),
    Row("head_dim", "head_dim"),
    Row("first_k_dense_replace", "dense_layers"),
    Row("num_experts", "experts"),
    Row("num_experts_per_tok", "experts_per_token"),
    Row("moe_intermediate_size", "expert_hidden_size"),
    Row("n_group", "expert_groups"),
    Row("topk_group", "expert_groups_per_token"),
    Row("routed_scaling_factor", "routed_scaling_factor", 1.0),
    Row("moe_router_enable_expert_bias", "expert_bias"),
    Row("use_qk_norm", "qk_norm", True),
    Row("partial_rotary_factor", "rotary_fraction", 1.0),
    Row("rope_theta", "rotary_base"),
)
LLAMA_ROWS = (*SHARED_ROWS, Row("rope_theta", "rotary_base", 10000.0))
BAILING_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_qkv_bias": False,
    "rope_scaling": None,
    "use_sliding_window": False,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "norm_head": False,
}
LLAMA_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_scaling": None,
}
WRITTEN: dict[str, dict[str, Any]] = {
    AUTOREGRESSIVE_MOE: {
        "model_type": "bailing_moe",
        "auto_map": {
            "AutoConfig": "configuration_bailing_moe_v2.BailingMoeV2Config",
            "AutoModel": "modeling_bailing_moe_v2.BailingMoeV2Model",
            "AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
        },
    },
    DIFFUSION_MOE: {
        "model_type": "llada2_moe",
        "auto_map": {
            "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
            "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
            "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
        },
    },
    DENSE: {"model_type": "llama"},
}
"""Beside `architectures`; the .py files that auto_map names belong to the public repositories."""
REMEDY = "give the directory of a Hugging Face checkpoint"
DROPOUTS = {"attention_dropout": 0.0, "embedding_dropout": 0.0, "output_dropout": 0.0}
NO_PREDICTION = {PREDICTION_LAYERS: 0, "mtp_loss_scaling_factor": 0}


def architecture_of(described: dict[str, Any]) -> str:
    """The first of `architectures`; `none` where there is none."""
    return (described.get("architectures") or ["none"])[0]


def is_moe(architecture: str, where: str) -> bool:
    """Whether an architecture has experts; BadInput for one that is not served."""
    family_of(architecture, where)
    return architecture in BAILING.architectures


def model_config(described: dict[str, Any], mask_token_id: int, where: str) -> ModelConfig:
    """The architecture that a config.json describes, which names no mask token.

    Raises BadInput for another architecture, a missing key or a setting that is not served.
    """
    moe = is_moe(architecture_of(described), where)
    described = _with_rope_theta(described, where)
    table, fixed = (BAILING_ROWS, BAILING_FIXED) if moe else (LLAMA_ROWS, LLAMA_FIXED)
    for key, served in fixed.items():
        if described.get(key, served) != served:
            raise BadInput(f"{where} sets {key}={described[key]}: only {served} is served.")
    values = {row.ours: described.get(row.theirs, row.absent) for row in table}
    for row in table:
        if values[row.ours] is REQUIRED:
            raise BadInput(f"{where} has no '{row.theirs}'.")
        if not isinstance(values[row.ours], int | float):  # a truth value is an int
            raise BadInput(f"{where} sets {row.theirs}={values[row.ours]!r}: it must be a number.")
    if moe:
        values["shared_expert_hidden_size"] = values["expert_hidden_size"] * (
            described.get("num_shared_experts") or 0
        )
    else:
        values["kv_heads"] = described.get("num_key_value_heads") or values["heads"]
        values["head_dim"] = described.get("head_dim") or values["hidden_size"] // values["heads"]
        values |= {"dense_layers": values["layers"], "qk_norm": False, "rotary_fraction": 1.0}
    values["rotary_base"] = float(values["rotary_base"])
    model = ModelConfig(mask_token_id=mask_token_id, **values)
    _require_same_groups(model)
    if not 0 <= mask_token_id < model.vocab_size:
        raise BadInput(
            f"--mask-token-id {mask_token_id} is outside the vocabulary of {model.vocab_size} in {where}."
        )
    return model


def describe(
    model: ModelConfig, architecture: str, carried: dict[str, Any], dtype: str, positions: int
) -> dict[str, Any]:
    """config.json of a model under an architecture that can express it, else BadInput.

    `carried` is the config.json that the model came with, empty where there was none: under the same
    architecture only what differs is changed. `positions` is the longest sequence where it does not say.
    """
    _require_expressible(model, architecture)
    moe = is_moe(architecture, "--architecture")
    table = BAILING_ROWS if moe else LLAMA_ROWS
    values = {row.theirs: getattr(model, row.ours) for row in table}
    values |= {"num_key_value_heads": model.kv_heads, "head_dim": model.head_dim}
    if moe:
        values["num_shared_experts"] = model.shared_expert_hidden_size // model.expert_hidden_size
    values["dtype" if "dtype" in carried else "torch_dtype"] = dtype
    if architecture_of(carried) == architecture:
        if carried.get(PREDICTION_LAYERS):
            values |= NO_PREDICTION
        absent = {row.theirs: row.absent for row in table}
        absent |= {"head_dim": model.hidden_size // model.heads, "num_key_value_heads": model.heads}
        said = absent | _with_rope_theta(carried, "config.json")
        changed = {key: value for key, value in values.items() if said.get(key) != value}
        return carried | changed | ({"mask_token_id": model.mask_token_id} if changed else {})
    fixed = BAILING_FIXED | DROPOUTS | {"router_dtype": "fp32"} if moe else LLAMA_FIXED
    kept = {key: value for key, value in carried.items() if key not in NO_PREDICTION | {"auto_map": None}}
    defaults = {"max_position_embeddings": positions, "pad_token_id": None}
    written = {"architectures": [architecture], **WRITTEN[architecture]}
    return defaults | kept | written | fixed | values | {"mask_token_id": model.mask_token_id}


def generation_config(
    carried: dict[str, Any], described: dict[str, Any], mask_token_id: int
) -> dict[str, Any]:
    """generation_config.json: what was carried along, without the mask among the ids that end a text."""
    source = carried or {
        key: described[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if described.get(key) is not None
    }
    ends = source.get("eos_token_id")
    if isinstance(ends, list) and mask_token_id in ends:
        return source | {"eos_token_id": [token for token in ends if token != mask_token_id]}
    return source


def _with_rope_theta(described: dict[str, Any], where: str) -> dict[str, Any]:
    """With `rope_theta` where newer configurations put it into `rope_parameters`."""
    parameters = described.get("rope_parameters")
    if not parameters:
        return described
    if parameters.get("rope_type", "default") != "default":
        raise BadInput(f"{where} sets rope_type={parameters['rope_type']}: only default is served.")
    return described | {key: value for key, value in parameters.items() if key != "rope_type"}


def _require_same_groups(model: ModelConfig) -> None:
    """The public code scores a group by its best two experts, megatron-core by its best k / chosen groups."""
    chosen = model.expert_groups_per_token
    if chosen < model.expert_groups and model.experts_per_token != 2 * chosen:
        raise BadInput(
            f"megatron-core and the public code choose {model.experts_per_token} experts from {chosen} groups"
            f" in different ways: only {2 * chosen} experts per token, two per group, are served."
        )


def _require_expressible(model: ModelConfig, architecture: str) -> None:
    moe = is_moe(architecture, "--architecture")
    if moe != (model.experts > 0):
        kind = "no experts" if moe else f"{model.experts} experts"
        raise BadInput(f"The model has {kind}: {architecture} cannot hold it, choose another --architecture.")
    _require_same_groups(model)
    if moe and model.shared_expert_hidden_size % model.expert_hidden_size:
        raise BadInput(
            f"{architecture} has shared experts of a multiple of the experts' width"
            f" {model.expert_hidden_size}, not {model.shared_expert_hidden_size}."
        )
    if architecture == DIFFUSION_MOE and not model.qk_norm:
        raise BadInput(
            f"The public code of {DIFFUSION_MOE} always has QK-norm and this model has none:"
            f" choose --architecture {AUTOREGRESSIVE_MOE}."
        )
    if not moe and (model.qk_norm or model.rotary_fraction != 1.0):
        raise BadInput(
            f"{architecture} has no QK-norm and rotates the whole head; this model is built otherwise"
            " (model.qk_norm, model.rotary_fraction)."
        )
