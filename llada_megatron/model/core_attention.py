"""The only place where the model meets the mask: megatron-core's `core_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention


@dataclass
class MaskParams(PackedSeqParams):
    """Carries the mask through GPTModel and every layer, also under recompute and on every pipeline stage.

    megatron-core hands `packed_seq_params` to each layer untouched as long as qkv_format is not 'thd'.
    """

    mask: BlockDiffusionMask | None = None


class BlockDiffusionCoreAttention(MegatronModule):
    """Softmax attention under a BlockDiffusionMask; has no parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        backend: str = "auto",
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.backend = backend

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: MaskParams | None = None,
        **unused: Any,
    ) -> torch.Tensor:
        """query [S, B, heads, D]; key, value [S, B, kv_heads, D]; returns [S, B, heads * D]."""
        assert packed_seq_params is not None and packed_seq_params.mask is not None
        out = block_diffusion_attention(
            query, key, value, packed_seq_params.mask, backend=self.backend, softmax_scale=self.softmax_scale
        )
        return out.flatten(2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}
