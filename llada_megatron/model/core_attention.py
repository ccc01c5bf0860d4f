"""The only place where the model meets the mask: megatron-core's `core_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.attention import block_diffusion_attention
from llada_megatron.attention.context import ContextShard, exchange

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Any, float], torch.Tensor]
"""An executor: query, key, value, Rectangle, softmax scale -> output; shapes as in attention/registry.py."""


@dataclass
class ShardParams(PackedSeqParams):
    """Carries the mask, and what this rank holds of it, through GPTModel and every layer.

    megatron-core hands `packed_seq_params` to each layer untouched as long as qkv_format is not 'thd', also
    under recompute and on every pipeline stage.
    """

    shard: ContextShard | None = None


class BlockDiffusionCoreAttention(MegatronModule):
    """Softmax attention under a BlockDiffusionMask, with context parallelism; has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        backend: Attention | str = "auto",
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.context_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: ShardParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """query [S/cp, B, heads, D]; key, value [S/cp, B, kv_heads, D]; returns [S/cp, B, heads * D]."""
        assert packed_seq_params is not None and packed_seq_params.shard is not None
        shard = packed_seq_params.shard
        key, value = exchange(key, value, shard, self.context_group)
        if callable(self.backend):
            scale = self.softmax_scale or query.shape[-1] ** -0.5
            out = self.backend(query, key, value, shard.rectangle, scale)
        else:
            out = block_diffusion_attention(
                query, key, value, shard.rectangle, backend=self.backend, softmax_scale=self.softmax_scale
            )
        return out.flatten(2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}
