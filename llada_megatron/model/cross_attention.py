"""Which concepts a token sees, as a rectangle of the causal mask, and the module that attends to them.

The keys of a document are a learned start vector, then its concepts. A token sees those of its document up to
the newest one that is finished, so it takes part as a row at that key's place of a causal mask, and every
executor of the registry serves it. A mean of a concept's tokens is finished when the next one begins, its
first token at once.

Replicated, every concept stands once per token of it: the keys are as many as the tokens, as in DLCM, whose
attention kernels take no ragged rows. A softmax would count a concept as often as it has copies; -log(copies)
on its scores takes that back exactly. The scores get it as channels of their own, so that no executor needs
to know.

Legend: T tokens, M concepts, K keys, H hidden size of tokens, Hc of concepts, n heads, d channels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask, Rectangle, block_diffusion_attention
from llada_megatron.attention.registry import Executor
from llada_megatron.config.concepts import CHANNELS
from llada_megatron.config.schema import BlockGrid
from llada_megatron.model.concepts import Segments
from llada_megatron.model.specs import RMSNorm
from llada_megatron.runtime.device import sent

PARTS = 3
"""Numbers of the model's dtype that log(copies) is the sum of: 24 bits in bf16."""


@dataclass(frozen=True)
class Sight:
    """The keys, and who sees which of them."""

    rectangle: Rectangle
    entry: np.ndarray
    """int64 [K], of what each key is made: 0 for the start vector, 1 + m for concept m."""
    copies: np.ndarray | None = None
    """int64 [K], how often each key stands there; None: once."""


def sight(segments: Segments, *, own: bool, replicated: bool) -> Sight:
    """The keys of a micro-batch's documents. own: a token sees the concept that it is part of.

    Not both: how many copies an unfinished concept has is known from later tokens, and would show in the last
    bits of what its tokens see.
    """
    assert not (own and replicated)
    documents = len(segments.starts)
    before = segments.document + 1  # start vectors up to a token's
    if replicated:
        units, starts = segments.concept, segments.starts
        newest = segments.first[segments.concept] - 1 + before
    else:
        units, starts = np.arange(segments.count), segments.document_starts
        newest = segments.concept - 1 + own + before
    places = starts + np.arange(documents)  # of the start vectors
    K = len(units) + documents
    entry = np.zeros(K, dtype=np.int64)
    entry[np.setdiff1d(np.arange(K), places)] = units + 1
    mask = BlockDiffusionMask(
        [torch.from_numpy(np.append(places, K))],
        1,
        block_grid=BlockGrid.sequence,
        clean_copy=False,
        causal=True,
    )
    rectangle = Rectangle(mask, newest[None], newest[None, :0])
    return Sight(rectangle, entry, np.append(1, segments.lengths)[entry] if replicated else None)


def attend(
    query: Tensor, key: Tensor, value: Tensor, seen: Sight, backend: str | Executor = "auto"
) -> Tensor:
    """Attention of tokens to their keys, [T, 1, n, d]; query [T, 1, n, d], key and value [K, 1, nkv, d].

    The softmax scale is 1 / sqrt(d).
    """
    scale, d = query.shape[-1] ** -0.5, query.shape[-1]
    if seen.copies is not None:
        rest = -torch.from_numpy(seen.copies).double().log() / scale
        parts = []
        for _ in range(PARTS):
            parts.append(rest.to(query.dtype))
            rest = rest - parts[-1].double()
        bias_KC = sent(torch.nn.functional.pad(torch.stack(parts, dim=-1), (0, CHANNELS - PARTS)), key.device)
        query = torch.cat([query, query.new_ones(*query.shape[:3], CHANNELS)], dim=-1)
        key = torch.cat([key, bias_KC[:, None, None].expand(*key.shape[:3], CHANNELS)], dim=-1)
        value = torch.nn.functional.pad(value, (0, CHANNELS))
    output = block_diffusion_attention(
        query, key, value, seen.rectangle, backend=backend, softmax_scale=scale
    )
    return output[..., :d]


class ConceptAttention(MegatronModule):
    """Causal attention of tokens to concepts: queries of H, keys and values of Hc, RMSNorm on both.

    Heads are split over tensor parallelism, rows are whole: sequence parallelism begins again behind it.
    """

    def __init__(
        self,
        config: TransformerConfig,
        concept_hidden_size: int,
        *,
        kv_heads: int,
        backend: str | Executor,
        pg_collection: Any,
    ) -> None:
        whole = replace(config, sequence_parallel=False, tp_comm_overlap=False)
        super().__init__(config=whole)
        self.backend, self.head_dim = backend, config.kv_channels
        width = config.num_attention_heads * self.head_dim
        given = {
            "config": whole,
            "init_method": torch.nn.init.zeros_,  # model/initialize.py fills the weights
            "bias": False,
            "tp_group": pg_collection.tp,
        }
        self.linear_q = ColumnParallelLinear(config.hidden_size, width, gather_output=False, **given)
        self.linear_kv = ColumnParallelLinear(
            concept_hidden_size, 2 * kv_heads * self.head_dim, gather_output=False, **given
        )
        self.linear_proj = RowParallelLinear(
            width, config.hidden_size, input_is_parallel=True, skip_bias_add=False, **given
        )
        self.q_layernorm = RMSNorm(whole, self.head_dim, eps=config.layernorm_epsilon)
        self.k_layernorm = RMSNorm(whole, self.head_dim, eps=config.layernorm_epsilon)
        self.start = torch.nn.Parameter(torch.empty(concept_hidden_size, dtype=config.params_dtype))
        """What a token sees before any concept is finished, [Hc]."""

    def forward(self, hidden_TH: Tensor, concepts_MH: Tensor, seen: Sight) -> Tensor:
        """[T, H] of tokens [T, H] and concepts [M, Hc]."""
        known = torch.cat([self.start[None], concepts_MH])
        entries = known.index_select(0, sent(torch.from_numpy(seen.entry), known.device))
        return self.told(hidden_TH, *self.keys_of(entries), seen)

    def keys_of(self, entries_KH: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [K, 1, nkv, d] of start vectors and concepts [K, Hc]."""
        pairs = self.linear_kv(entries_KH[:, None])[0].unflatten(-1, (-1, 2, self.head_dim))
        key, value = pairs.unbind(-2)
        return self.k_layernorm(key), value

    def told(self, hidden_TH: Tensor, key: Tensor, value: Tensor, seen: Sight) -> Tensor:
        """[T, H] of tokens [T, H] and keys and values [K, 1, nkv, d]."""
        query = self.linear_q(hidden_TH[:, None])[0].unflatten(-1, (-1, self.head_dim))
        output = attend(self.q_layernorm(query), key, value, seen, self.backend)
        return self.linear_proj(output.flatten(2))[0][:, 0]
