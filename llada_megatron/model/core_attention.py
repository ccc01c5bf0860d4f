"""The only place where the model meets the mask: megatron-core's `core_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.attention import block_diffusion_attention
from llada_megatron.attention.keys import Keys
from llada_megatron.attention.registry import Executor


@dataclass
class KeysParams(PackedSeqParams):
    """Carries the mask, and which keys exist for the rows at hand, through GPTModel and every layer.

    megatron-core hands `packed_seq_params` to each layer untouched as long as qkv_format is not 'thd', also
    under recompute and on every pipeline stage.
    """

    keys: Keys | None = None
    angles: torch.Tensor | None = None
    """fp32 [S, B or 1, 1, channels], for layers that rotate by themselves (model/mla.py)."""


class BlockDiffusionCoreAttention(MegatronModule):
    """Softmax attention of the rows at hand to their Keys; has no parameters.

    `backend` is a setting of model.attention_backend or an executor itself.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        backend: str | Executor = "auto",
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.layer_number = layer_number
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: KeysParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """[S, B, heads Dv] of query [S, B, heads, D], key [S, B, kv_heads, D], value [S, B, kv_heads, Dv].

        Without a value it is the key's first channels, a latent of model/mla.py, and only keys are kept.
        Tensors of latent attention come without B where it is 1.
        """
        assert packed_seq_params is not None and packed_seq_params.keys is not None
        keys = packed_seq_params.keys
        is_latent = value is None
        value = key[..., :0] if value is None else value
        query, key, value = (each[:, None] if each.dim() == 3 else each for each in (query, key, value))
        key, value = keys.of(key, value, self.layer_number, self.context_group)
        if is_latent:
            value = key[..., : self.config.kv_lora_rank]
        out = block_diffusion_attention(
            query, key, value, keys.rectangle, backend=self.backend, softmax_scale=self.softmax_scale
        )
        return out.flatten(2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}
