"""DLCM (arXiv 2512.24617) on megatron-core's transformer blocks: encoder, concepts, backbone, decoder.

    h = encoder(embedding);  boundaries b by p = (1 - cos(W_q h_{t-1}, W_k h_t)) / 2
    c = W (mean of h over a concept);  z = moving average of backbone(c)
    logits = head(decoder(h + attention of h to finished z))

A token sees nothing of later ones: its boundary depends on it and the token before, and of concepts it
sees those that are finished. The host reads back the boundaries once in a forward: their number is a shape.

Legend: S tokens of a sample, B samples, T = S B, H hidden size of tokens, Hc of concepts, M concepts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from llada_megatron.attention import BlockDiffusionMask
from llada_megatron.attention.context import ContextShard
from llada_megatron.attention.keys import Keys
from llada_megatron.attention.registry import Executor
from llada_megatron.config.concepts import ROWS
from llada_megatron.config.schema import BlockGrid, ModelConfig
from llada_megatron.model.concept_cache import CachedConcepts, Entries, Reading, at_of
from llada_megatron.model.concepts import (
    Segments,
    boundary_probability,
    chosen_probability,
    opened,
    pooled_mean,
    pooled_sum,
    sharpened,
    smoothed,
)
from llada_megatron.model.core_attention import KeysParams
from llada_megatron.model.cross_attention import ConceptAttention, Sight, sight
from llada_megatron.model.head import head_output, reduce_input_gradient_once
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.model.readout import CROSS_ENTROPY, Readout
from llada_megatron.model.rotary import ExplicitRotary
from llada_megatron.runtime.device import sent

PARSED = Readout("cross entropy and boundaries", 1, needs_labels=True, read=CROSS_ENTROPY.read)
"""[N + 2B]: the cross entropies, then of each sample how many tokens open a concept, and the sum of p."""
BOUNDARIES = Readout("boundaries", 1, needs_labels=False, read=CROSS_ENTROPY.read)
"""[2B]: the latter alone, for which no more than the encoder runs."""

Blocks = dict[str, tuple[TransformerConfig, TransformerBlockSubmodules]]
"""Of `encoder`, `backbone` and `decoder`: megatron-core's settings and layers."""


@dataclass(frozen=True)
class Arrangement:
    """What the host makes of a micro-batch's boundaries."""

    segments: Segments
    seen: Sight
    positions: np.ndarray
    """int64 [rows of the backbone], of each concept in its document."""
    keys: ContextShard
    """The backbone's."""


def on_host(opened_T: Tensor, arranged: Callable[[np.ndarray], Arrangement]) -> Arrangement:
    """The one moment of a forward that the host waits for."""
    return arranged(opened_T.cpu().numpy())


class DynamicConcepts(LanguageModule):
    """The whole model; `forward` takes ModelInputs of a causal mask."""

    model_type = ModelType.encoder_or_decoder
    pre_process = post_process = True
    share_embeddings_and_output_weights = False
    vp_stage = None

    def __init__(
        self,
        model: ModelConfig,
        blocks: Blocks,
        *,
        longest: int,
        backend: str | Executor,
        output_scale: float,
    ) -> None:
        tokens, concepts = blocks["encoder"][0], blocks["backbone"][0]
        super().__init__(config=tokens)
        self.settings, self.head_chunk_tokens, self.output_scale = (
            model,
            model.head_chunk_tokens,
            output_scale,
        )
        groups, H, Hc = self.pg_collection, tokens.hidden_size, concepts.hidden_size
        self.embedding = LanguageModelEmbedding(
            tokens, model.vocab_size, longest, position_embedding_type="rope", tp_group=groups.tp
        )
        self.rotary = ExplicitRotary()
        encoder, backbone, decoder = (
            TransformerBlock(config, spec, pg_collection=groups) for config, spec in blocks.values()
        )
        whole = {"bias": False, "dtype": tokens.params_dtype}
        # In the order of the forward, in which weights are gathered and gradients sent.
        self.encoder = encoder
        self.boundary_q = torch.nn.Linear(H, H, **whole)
        self.boundary_k = torch.nn.Linear(H, H, **whole)
        self.concept_proj = torch.nn.Linear(H, Hc, **whole)
        self.backbone = backbone
        self.concept_attention = ConceptAttention(
            tokens, Hc, kv_heads=model.kv_heads, backend=backend, pg_collection=groups
        )
        self.decoder = decoder
        self.output_layer = ColumnParallelLinear(
            H,
            model.vocab_size,
            config=tokens,
            init_method=tokens.init_method,
            bias=False,
            gather_output=False,
            tp_group=groups.tp,
        )
        reduce_input_gradient_once(self.output_layer)
        self.on_host = on_host
        """A dry run, whose boundaries have no values, puts its own here."""

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Nothing comes from another pp_stage."""

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without `_extra_state`: empty fp8 scaling factors, of which each layer spec has others."""
        sharded = super().sharded_state_dict(*args, **kwargs)
        return {name: entry for name, entry in sharded.items() if "_extra_state" not in name}

    def forward(self, inputs: ModelInputs) -> Tensor:
        """What `inputs.readout` says: PARSED and BOUNDARIES as they say, others of the N rows alone."""
        B, S = inputs.tokens.shape
        embedded = self.embedding(input_ids=inputs.tokens, position_ids=None)
        angles = self.rotary(inputs.positions)
        hidden = self.encoder(
            embedded, None, rotary_pos_emb=angles, packed_seq_params=_params(inputs.keys, S)
        )
        hidden_TH = self._rows(hidden, S, B)
        if isinstance(inputs.keys, CachedConcepts):
            told_TH = self._told_of_kept(hidden_TH, inputs.keys)
            return self._said(hidden_TH + told_TH, angles, inputs, inputs.keys.of_decoder)
        starts = _starts(inputs)
        p_T, opened_T = self._boundaries(hidden_TH, sent(torch.from_numpy(starts), hidden_TH.device), inputs)
        sums_2B = torch.stack([opened_T.float(), p_T.float()]).view(2, B, S).sum(dim=-1).flatten()
        if inputs.readout == BOUNDARIES:
            return sums_2B
        laid_out = self.on_host(opened_T, partial(self._arranged, starts))
        concepts_MH = self._concepts(hidden_TH, p_T, laid_out)
        told_TH = self.concept_attention(hidden_TH, concepts_MH, laid_out.seen)
        if self.settings.concepts.boundary_grad == "ste":
            told_TH = told_TH * chosen_probability(p_T, opened_T)[:, None].to(told_TH.dtype)
        found = self._said(hidden_TH + told_TH, angles, inputs, inputs.keys)
        return torch.cat([found, sums_2B]) if inputs.readout == PARSED else found

    def _said(self, mixed_TH: Tensor, angles: Tensor, inputs: ModelInputs, keys: Keys) -> Tensor:
        """What decoder and head make of tokens that were told of concepts."""
        B, S = inputs.tokens.shape
        mixed = mixed_TH.view(B, S, -1).transpose(0, 1).contiguous()
        if self.config.sequence_parallel:
            mixed = scatter_to_sequence_parallel_region(mixed)
        hidden = self.decoder(mixed, None, rotary_pos_emb=angles, packed_seq_params=_params(keys, S))
        return head_output(
            hidden_states=hidden * self.output_scale,
            output_layer=self.output_layer,
            output_weight=None,
            context=(inputs, self.head_chunk_tokens),
            config=self.config,
        )

    @property
    def _sees_own(self) -> bool:
        return self.settings.concepts.concept == "boundary_token"

    def _rows(self, hidden: Tensor, S: int, B: int) -> Tensor:
        """[T, H] of all samples, one after the other, on every tensor-parallel rank; from [S/tp, B, H].

        What follows is the same on all of them, and so is its gradient: each takes its part.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        return hidden.transpose(0, 1).reshape(S * B, -1)

    def _boundaries(self, hidden_TH: Tensor, starts: Tensor, inputs: ModelInputs) -> tuple[Tensor, Tensor]:
        """p [T], and which tokens open a concept, bool [T]: by draws where the inputs have them."""
        p_T = boundary_probability(self.boundary_q(hidden_TH), self.boundary_k(hidden_TH), starts)
        chances_T = p_T.detach()
        if inputs.draws is None:
            return p_T, opened(chances_T, starts)
        sharp_T = sharpened(chances_T, self.settings.concepts.sharpening)
        return p_T, opened(sharp_T, starts, inputs.draws.flatten())

    def _arranged(self, starts: np.ndarray, opened_T: np.ndarray) -> Arrangement:
        segments, multiple = Segments(opened_T, starts), ROWS * self.config.tensor_model_parallel_size
        replicated = self.settings.concepts.attention == "replicated"
        seen = sight(segments, own=self._sees_own, replicated=replicated)
        return Arrangement(segments, seen, *_places(segments, -(-segments.count // multiple) * multiple))

    def _concepts(self, hidden_TH: Tensor, p_T: Tensor, laid_out: Arrangement) -> Tensor:
        """What the backbone makes of the concepts, smoothed, [M, Hc]."""
        segments, rows = laid_out.segments, len(laid_out.positions)
        at, M = hidden_TH.device, segments.count
        first_M = sent(torch.from_numpy(segments.first), at)
        if self._sees_own:
            raw_MH = hidden_TH.index_select(0, first_M)
        else:
            concept_T, lengths_M = (
                sent(torch.from_numpy(each), at) for each in (segments.concept, segments.lengths)
            )
            raw_MH = pooled_mean(hidden_TH, concept_T, lengths_M)
        projected = torch.nn.functional.pad(self.concept_proj(raw_MH), (0, 0, 0, rows - M))
        read_MH = self._read_concepts(projected, laid_out.positions, laid_out.keys, M)
        weight_M = p_T.index_select(0, first_M)
        if self.settings.concepts.boundary_grad == "none":
            weight_M = weight_M.detach()
        return smoothed(read_MH, weight_M)

    def _read_concepts(self, projected: Tensor, positions: np.ndarray, keys: Keys, M: int) -> Tensor:
        """What the backbone makes of the first M of [rows, Hc], [M, Hc]; the balance counts no others."""
        rows, at = len(projected), projected.device
        hidden, ignored = projected[:, None], torch.arange(rows, device=at)[None] >= M
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden)
            ranks, rank = self.pg_collection.tp.size(), self.pg_collection.tp.rank()
            ignored = ignored.chunk(ranks, dim=1)[rank]
        hidden = self.backbone(
            hidden,
            None,
            rotary_pos_emb=self.rotary(sent(torch.from_numpy(positions), at)[None]),
            packed_seq_params=_params(keys, rows),
            padding_mask=ignored,
        )
        return self._rows(hidden, rows, 1)[:M]

    def _told_of_kept(self, hidden_TH: Tensor, keys: CachedConcepts) -> Tensor:
        """What new tokens see of concepts, [T, H], by what is kept of their sequences.

        The backbone reads the concepts that are finished with these tokens, if there are any.
        """
        entries, first = keys.entries, at_of(keys.first_entries, hidden_TH)
        query_TC, key_TC = self.boundary_q(hidden_TH), self.boundary_k(hidden_TH)
        query_PC = keys.kept("query", query_TC)
        keys.keep("query", query_TC.index_select(0, at_of(keys.marked_rows, query_TC)))
        p_E = boundary_probability(
            entries.of(query_PC, query_TC), entries.of(query_PC.new_zeros(query_PC.shape), key_TC), first
        )
        opened_E = opened(p_E, first)
        p_E = p_E.index_copy(0, at_of(entries.kept, p_E), keys.kept("p", p_E))
        reading = keys.read(opened_E.cpu().numpy(), own=self._sees_own)
        start = self.concept_attention.start[None][: int(keys.begins.any())]
        new_FH = self._new_concepts(hidden_TH, p_E, reading)
        written = self.concept_attention.keys_of(torch.cat([start, new_FH]))
        places, read, seen = reading.told()
        known = []
        for pool, rows in zip(keys.cache.seen.of_layer(1, *written), written, strict=True):
            pool.index_copy_(0, at_of(places, rows), rows[:, 0])
            known.append(pool.index_select(0, at_of(read, rows))[:, None])
        return self.concept_attention.told(hidden_TH, known[0], known[1], seen)

    def _new_concepts(self, hidden_TH: Tensor, p_E: Tensor, reading: Reading) -> Tensor:
        """The concepts that the backbone has not read yet, smoothed, [F, Hc], in the order of their parts."""
        keys, segments, M = reading.keys, reading.segments, reading.segments.count
        p_M = p_E.index_select(0, at_of(segments.first, p_E))
        keys.keep("p", p_M.index_select(0, at_of(reading.marked, p_E)))
        wide_TH = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
        if self._sees_own:
            wide_EH = keys.entries.of(wide_TH.new_zeros(len(keys.begins), wide_TH.shape[1]), wide_TH)
            raw_MH = wide_EH.index_select(0, at_of(segments.first, wide_EH))
        else:
            wide_EH = keys.entries.of(keys.kept("sum", wide_TH), wide_TH)
            added, sums, up_to_mark = (at_of(each, wide_EH) for each in reading.summed())
            sums_H = pooled_sum(wide_EH.index_select(0, added), sums, M + len(keys.marks))
            keys.keep("sum", sums_H.index_select(0, up_to_mark))
            raw_MH = sums_H[:M] / at_of(reading.tokens, sums_H).clamp(min=1)[:, None]
        is_new = at_of(np.flatnonzero(reading.is_new), raw_MH)
        read_FH = self._read_new(raw_MH.index_select(0, is_new).to(hidden_TH.dtype), reading)
        wide_FH = read_FH.to(torch.promote_types(read_FH.dtype, torch.float32))
        news = Entries(reading.counts)
        s_EH = news.of(keys.kept("s", wide_FH), wide_FH)
        if len(wide_FH):
            s_EH = smoothed(s_EH, news.of(p_M.new_ones(len(keys.begins)), p_M.index_select(0, is_new)))
        keys.keep("s", s_EH.index_select(0, at_of(news.kept[keys.part] + reading.new, s_EH)))
        return s_EH.index_select(0, at_of(news.rows, s_EH)).to(read_FH.dtype)

    def _read_new(self, raw_FH: Tensor, reading: Reading) -> Tensor:
        """What the backbone makes of means or first tokens, [F, Hc] of [F, H], if there are any."""
        F = len(raw_FH)
        projected = self.concept_proj(raw_FH)
        if not F:
            return projected
        spare = -F % self.config.tensor_model_parallel_size
        places = reading.backbone(spare).to(projected.device)
        padded = torch.nn.functional.pad(projected, (0, 0, 0, spare))
        return self._read_concepts(padded, places.positions, places, F)


def _params(keys: Any, S: int) -> KeysParams:
    return KeysParams(qkv_format="bshd", max_seqlen_q=S, max_seqlen_kv=S, keys=keys)


def _starts(inputs: ModelInputs) -> np.ndarray:
    """First tokens of all documents, int64 [D], in one row of samples."""
    starts_BL = inputs.keys.mask.document_start
    return np.flatnonzero(starts_BL == np.arange(starts_BL.shape[1]))


def _places(segments: Segments, rows: int) -> tuple[np.ndarray, ContextShard]:
    """The concepts' places in their documents, int64 [rows], and their causal mask; padding is a document."""
    starts, M = segments.document_starts, segments.count
    edges = np.unique(np.append(starts, (M, rows)))
    positions = np.arange(rows) - np.repeat(edges[:-1], np.diff(edges))
    mask = BlockDiffusionMask(
        [torch.from_numpy(edges)], 1, block_grid=BlockGrid.sequence, clean_copy=False, causal=True
    )
    return positions, ContextShard(mask)
