"""Multi-head latent attention at explicit positions, and on kept latents (DeepSeek-V2, arXiv 2405.04434).

megatron-core's MLASelfAttention, to which three things are handed in: the angles of the rows at hand, the
norms of the latents as modules of their own (so that both layer specs write the same keys), and where
decoding keeps keys, the absorbed form of its product. With c the latent of keys and values, r its rotated
key, W_UK and W_UV the parts of kv_b that make a head's key and value of it,

    q . [W_UK c; r] = [W_UK^T q_nope; q_rope] . [c; r]        sum_i p_i W_UV c_i = W_UV sum_i p_i c_i

so that attention runs over [c; r], one key for all heads, whose first channels are its value.

Legend: S rows, t of them on this rank under sequence parallelism, B batch, H heads of this rank, R
kv_lora_rank, Dn, Dr and Dv the widths of a head without and with positions and of its value.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from llada_megatron.attention.keys import PooledKeys
from llada_megatron.model.core_attention import KeysParams


class GivenAngles(torch.nn.Module):
    """Stands in for the rotary embedding that each layer has, which knows only 0..S-1."""

    factor = 1.0
    """Of cosines and sines."""

    def get_rotary_seq_len(
        self, context: Any, transformer: Any, hidden: Tensor, config: Any, params: KeysParams
    ) -> Tensor:
        """The angles, which megatron-core hands to `forward` as what it believes a length."""
        assert params.angles is not None
        # A batch of one loses its dimension before rotation (multi_latent_attention.py:760 in 0.19.2).
        return params.angles.squeeze(1) if hidden.size(1) == 1 else params.angles

    def forward(self, angles: Tensor, packed_seq: bool = False) -> tuple[Tensor, float]:
        """Angles fp32 [S, (B or 1,) 1, Dr], and the factor."""
        return angles, self.factor


class _NothingToDiscard:
    """Stands in for megatron-core's checkpoint of the ways up, where there are none."""

    def discard_output_and_register_recompute(self, hook_tensor: Tensor) -> None: ...


class LatentAttention(MLASelfAttention):
    """megatron-core's layer at explicit positions."""

    config: MLATransformerConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_pos_emb = GivenAngles()
        # Built for `rope`, whose embedding computes nothing beforehand; run as `yarn`, which has a factor.
        self.config = copy.copy(self.config)
        self.config.rope_type = "yarn"

    def set_scales(self, *, rotary: float, softmax: float) -> None:
        """The factors of cosines and sines, and of softmax's scale 1 / sqrt(Dn + Dr)."""
        self.rotary_pos_emb.factor = rotary
        self.core_attention.softmax_scale = softmax / self.q_head_dim**0.5

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        """The classes as the spec says: megatron-core's own choice would fuse a norm that the published
        model does not have into a full projection of queries (mla_qk_norm_config.py)."""
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [t, B, *] of queries and of keys and values.

        megatron-core gathers the rotated key of a projection that is split over tp without adding up its
        gradients, of which each rank has those of its heads (multi_latent_attention.py:739 in 0.19.2): as a
        part of the sequence it takes the way of a projection that is whole, which does.
        """
        query, latent = super()._qkv_down_projection(hidden_states)
        if latent.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            latent = scatter_to_sequence_parallel_region(gather_from_tensor_model_parallel_region(latent))
        return query, latent

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        position_ids: Tensor | None = None,
        packed_seq_params: KeysParams | None = None,
        inference_context: Any = None,
        **unused: Any,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """megatron-core's queries, keys and values; where keys are kept those of the absorbed form, [S, B, H,
        R + Dr] and [S, B, 1, R + Dr], and no values."""
        assert packed_seq_params is not None
        if not isinstance(packed_seq_params.keys, PooledKeys):
            given = hidden_states, key_value_states, position_ids, packed_seq_params, inference_context
            return cast(Any, super().get_query_key_value_tensors(*given))
        if self.recompute_up_proj:
            self.qkv_up_checkpoint = _NothingToDiscard()
        query_latent, joined = self._qkv_down_projection(hidden_states)
        config = self.config
        widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        latent, key_rope = joined.split(widths, dim=-1)
        latent = self.kv_layernorm(latent)
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(query_latent)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(query_latent))
        query = query.unflatten(-1, (self.num_attention_heads_per_partition, self.q_head_dim))
        kept = torch.cat([latent, key_rope], dim=-1)
        if self.tp_group.size() > 1:
            kept = gather_from_sequence_parallel_region(kept, group=self.tp_group)
        latent_SB1R, rope_SB1D = kept[..., None, :].split(widths, dim=-1)
        key_SB1D = torch.cat([latent_SB1R, self._rotated(rope_SB1D, packed_seq_params)], dim=-1)
        plain, rope = query.split([config.qk_head_dim, config.qk_pos_emb_head_dim], dim=-1)
        absorbed = torch.einsum("sbhd,hdr->sbhr", plain, self._up_weights()[0])
        query_SBHD = torch.cat([absorbed, self._rotated(rope, packed_seq_params)], dim=-1)
        return query_SBHD, key_SB1D, None, query_latent, latent

    def _run_core_attention(
        self, query: Tensor, key: Tensor, value: Tensor | None, attention_mask: Any, **kwargs: Any
    ) -> Tensor:
        """[S, B, H Dv]; of the absorbed form what attention made of latents, [S, B, H R], by W_UV."""
        output = super()._run_core_attention(query, key, value, attention_mask, **kwargs)
        if value is not None:
            return output
        latents = output.unflatten(-1, (self.num_attention_heads_per_partition, self.config.kv_lora_rank))
        return torch.einsum("sbhr,hdr->sbhd", latents, self._up_weights()[1]).flatten(2)

    def _rotated(self, heads: Tensor, params: KeysParams) -> Tensor:
        return apply_rotary_pos_emb(
            heads,
            params.angles,
            config=self.config,
            mscale=self.rotary_pos_emb.factor,
            cp_group=self.pg_collection.cp,
            mla_rotary_interleaved=True,
        )

    def _up_weights(self) -> tuple[Tensor, ...]:
        """W_UK [H, Dn, R] and W_UV [H, Dv, R]."""
        widths = [self.config.qk_head_dim, self.config.v_head_dim]
        weight = self.linear_kv_up_proj.weight
        return weight.unflatten(0, (self.num_attention_heads_per_partition, -1)).split(widths, dim=1)
