"""The only place where the model meets the mask: megatron-core's `core_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import all_to_all
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
    drops_clean_rows: bool = False
    """Whether nothing reads the clean half behind the last layer's attention."""


class BlockDiffusionCoreAttention(MegatronModule):
    """Softmax attention of the rows at hand to their Keys; has no parameters.

    `backend` is a setting of model.attention_backend or an executor itself. With `is_last` it returns the
    noisy rows alone where nothing reads others behind it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any = None,
        attention_type: str = "self",
        softmax_scale: float | None = None,
        backend: str | Executor = "auto",
        is_last: bool = False,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.backend = backend
        self.is_last = is_last
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
        Tensors of latent attention come without B where it is 1. Without the clean rows [S/2, B, heads Dv].
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
        if self.is_last and packed_seq_params.drops_clean_rows:
            out = out[: len(out) // 2]
        return out.flatten(2)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {}


def get_bias_dropout_add_of_noisy_rows(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """megatron-core's get_bias_dropout_add behind an attention that `is_last`: the residual of the rows that
    it returns, all of them or the noisy ones."""
    add = get_bias_dropout_add(training, fused)

    def added(
        output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        if len(output_with_bias[0]) < len(residual):
            residual = _noisy_rows(residual)
        return add(output_with_bias, residual, dropout)

    return added


def _noisy_rows(rows: torch.Tensor) -> torch.Tensor:
    """The first half [S/2, B, H] of all rows.

    Sequence parallelism gives each of R ranks the next S/R of them: the halves of rank r go to ranks 2r and
    2r + 1, so that again each has the next.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank, count = group.size(), group.rank(), len(rows) // 2
    if ranks == 1:
        return rows[:count]
    takers = [taker for taker in (2 * rank, 2 * rank + 1) if taker < ranks]
    given = [count * (taker in takers) for taker in range(ranks)]
    taken = [count * (giver == rank // 2) for giver in range(ranks)]
    return all_to_all(group, rows[: sum(given)], taken, given)
