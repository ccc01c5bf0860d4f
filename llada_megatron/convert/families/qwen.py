"""Qwen and what was made of it: Qwen2 and Dream, Qwen3 and SDAR, Qwen3-MoE and SDAR-MoE.

Names of tensors are Llama's. Qwen2 has biases on Q, K and V; Qwen3 norms on the heads of Q and K. SDAR turns
Qwen3 into block diffusion as it is done here, so a Qwen3 that was trained so leaves as SDAR. Dream fills a
mask from the logits at the position before it: a source to start from, and nothing that can be written here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llada_megatron.config.choices import ExpertScore
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import ModelConfig
from llada_megatron.convert.families.family import Family, Row
from llada_megatron.convert.families.forward import PROJECTIONS, Forward
from llada_megatron.convert.families.llama import table
from llada_megatron.convert.families.shared import BLOCK_SIZE, ROWS, all_dense, head_dim, never_needed
from llada_megatron.convert.rope_json import RotaryDefaults

DENSE_LAYERS = "mlp_only_layers"
SDAR_BLOCK = 4
"""Of the published SDAR models, and SGLang's where config.json says none."""
UNREAD = frozenset({"auto_map", "sliding_window", "router_aux_loss_coef"})
SDAR_TRAINING = frozenset(
    {
        *("attn_implementation", "debug", "ep_size", "fuse_cross_entropy", "micro_forward"),
        *("skip_checkpoint", "use_deepep"),
    }
)
"""Keys of SDAR's training code that change how, not what is computed."""


def kv_heads(described: dict[str, Any]) -> int:
    """Of a config.json that has none: all heads where it says null, 32 where it says nothing."""
    return described["num_attention_heads"] if "num_key_value_heads" in described else 32


def dense_layers(described: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """How many of the first layers have no experts; BadInput where others have none."""
    listed = described.get(DENSE_LAYERS) or []
    if not isinstance(listed, list) or listed != list(range(min(len(listed), values["layers"] - 1))):
        raise BadInput(
            f"{DENSE_LAYERS}={listed}: only the first layers, counted from 0, can be without experts."
        )
    return {"dense_layers": len(listed)}


def dense_layers_key(model: ModelConfig, carried: dict[str, Any]) -> dict[str, Any]:
    """The same on the way out; a config.json that says as much otherwise stays."""
    listed = list(range(model.dense_layers))
    return {DENSE_LAYERS: listed} if listed or not carried else {}


class QwenForward(Forward):
    """Logits of all of them: which parts a model has is seen from its tensors."""

    def queries_keys_values(self, name: str, normed_SH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = super().queries_keys_values(name, normed_SH)
        if f"{name}.q_proj.bias" in self.files.tensors:
            query, key, value = (
                rows + self.heads(self.get(f"{name}.{letter}_proj.bias"))
                for letter, rows in (("q", query), ("k", key), ("v", value))
            )
        if f"{name}.q_norm.weight" in self.files.tensors:
            query, key = self.norm(f"{name}.q_norm", query), self.norm(f"{name}.k_norm", key)
        return query, key, value

    def feed_forward(self, name: str, normed_SH: Tensor) -> Tensor:
        if f"{name}.gate.weight" not in self.files.tensors:
            return super().feed_forward(name, normed_SH)
        shares_SE = (normed_SH @ self.get(f"{name}.gate.weight").T).softmax(-1)
        share_Sk, chosen_Sk = shares_SE.topk(self.config["num_experts_per_tok"], dim=-1)
        if self.config.get("norm_topk_prob"):
            share_Sk = share_Sk / share_Sk.sum(-1, keepdim=True)
        weights_SE = torch.zeros_like(shares_SE).scatter(-1, chosen_Sk, share_Sk)
        return self.mixture(normed_SH, weights_SE, partial(self._expert, name))

    def _expert(self, name: str, expert: int) -> tuple[Tensor, ...]:
        return tuple(self.get(f"{name}.experts.{expert}.{p}_proj.weight") for p in PROJECTIONS)


def _rotary(*architectures: str) -> RotaryDefaults:
    return RotaryDefaults(
        dict.fromkeys(architectures, 10000.0), dict.fromkeys(architectures, 1.0), whole_head=True
    )


def _says_block_size(model: ModelConfig, architecture: str) -> bool:
    return architecture.startswith("SDAR")


def _auto_map(module: str, stem: str, causal: str) -> dict[str, str]:
    return {
        "AutoConfig": f"configuration_{module}.{stem}Config",
        "AutoModel": f"modeling_{module}.{stem}Model",
        "AutoModelForCausalLM": f"modeling_{module}.{causal}",
    }


QWEN2 = Family(
    architectures={
        "Qwen2ForCausalLM": {"model_type": "qwen2"},
        "DreamModel": {"model_type": "Dream", "auto_map": _auto_map("dream", "Dream", "DreamModel")},
    },
    shifted=frozenset({"DreamModel"}),
    after_diffusion="Qwen2ForCausalLM",
    experts=False,
    always={"qk_norm": False, "qkv_bias": True},
    rows=(*ROWS, Row("num_key_value_heads", "kv_heads", kv_heads), Row("head_dim", "head_dim", head_dim)),
    fixed={"hidden_act": "silu", "use_sliding_window": False, "use_mrope": False},
    rotary=_rotary("Qwen2ForCausalLM", "DreamModel"),
    idle=UNREAD,
    fields=all_dense,
    table=table,
    drop_reason=never_needed,
    reference=lambda files, config: QwenForward(files, config).logits,
)
QWEN3 = Family(
    architectures={
        "Qwen3ForCausalLM": {"model_type": "qwen3"},
        "SDARForCausalLM": {"model_type": "sdar", "auto_map": _auto_map("sdar", "SDAR", "SDARForCausalLM")},
    },
    blocks={"SDARForCausalLM": SDAR_BLOCK},
    after_diffusion="SDARForCausalLM",
    experts=False,
    always={"qk_norm": True, "qkv_bias": False},
    rows=(
        *ROWS,
        Row("num_key_value_heads", "kv_heads", kv_heads),
        Row("head_dim", "head_dim", lambda said: head_dim(said) if "head_dim" in said else 128),
    ),
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    rotary=_rotary("Qwen3ForCausalLM", "SDARForCausalLM"),
    counts=(BLOCK_SIZE,),
    idle=UNREAD | SDAR_TRAINING,
    fields=all_dense,
    says_block_size=_says_block_size,
    table=table,
    drop_reason=never_needed,
    reference=lambda files, config: QwenForward(files, config).logits,
)
QWEN3_MOE = Family(
    architectures={
        "Qwen3MoeForCausalLM": {"model_type": "qwen3_moe"},
        "SDARMoeForCausalLM": {
            "model_type": "sdar_moe",
            "auto_map": _auto_map("sdar_moe", "SDARMoe", "SDARMoeForCausalLM"),
        },
    },
    blocks={"SDARMoeForCausalLM": SDAR_BLOCK},
    after_diffusion="SDARMoeForCausalLM",
    experts=True,
    always={
        "qk_norm": True,
        "qkv_bias": False,
        "expert_score": ExpertScore.softmax,
        "expert_bias": False,
        "expert_groups": 1,
        "routed_scaling_factor": 1.0,
        "shared_expert_hidden_size": 0,
    },
    rows=(
        *ROWS,
        Row("num_key_value_heads", "kv_heads", kv_heads),
        Row("head_dim", "head_dim", head_dim),
        Row("num_experts", "experts"),
        Row("num_experts_per_tok", "experts_per_token"),
        Row("moe_intermediate_size", "expert_hidden_size"),
        Row("norm_topk_prob", "normalize_expert_weights", False),
    ),
    fixed={
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "decoder_sparse_step": 1,
    },
    rotary=_rotary("Qwen3MoeForCausalLM", "SDARMoeForCausalLM"),
    counts=(BLOCK_SIZE,),
    idle=UNREAD | SDAR_TRAINING | {DENSE_LAYERS},
    fields=dense_layers,
    keys=dense_layers_key,
    says_block_size=_says_block_size,
    table=table,
    drop_reason=never_needed,
    reference=lambda files, config: QwenForward(files, config).logits,
)
