"""Multi-head latent attention (docs/families.md)."""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.config.ranges import Extent


@dataclass
class MlaConfig:
    """Keys and values of all heads are made of one latent per token (DeepSeek-V2, arXiv 2405.04434).

    heads, kv_heads and head_dim of the model are those of the projections back: kv_heads = heads and
    head_dim = qk_nope_head_dim + qk_rope_head_dim.
    """

    kv_lora_rank: Extent = 0
    """Width of the latent of keys and values; 0: no latent attention."""
    q_lora_rank: Extent = 0
    """Width of the latent of queries; 0: one full projection."""
    qk_nope_head_dim: Extent = 0
    """Channels of a head's query and key without positions."""
    qk_rope_head_dim: Extent = 0
    """Rotated channels behind them, whose key all heads share."""
    v_head_dim: Extent = 0
    """Channels of a head's value."""

    @property
    def is_used(self) -> bool:
        """Whether a model has latent attention."""
        return self.kv_lora_rank > 0
