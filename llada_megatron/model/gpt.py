"""A pipeline stage on `[x_t ; x_0]`: explicit positions, embedding noise, a head on chosen rows; GPTModel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import AbstractSchedulePlan
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from llada_megatron.model import pools
from llada_megatron.model.core_attention import KeysParams
from llada_megatron.model.head import head_output, reduce_input_gradient_once
from llada_megatron.model.inputs import EmbeddingNoise, ModelInputs, SoftTokens
from llada_megatron.model.normal import noise_rows
from llada_megatron.model.readout import fused
from llada_megatron.model.rotary import ExplicitRotary
from llada_megatron.runtime.device import sent


class BlockDiffusionStage(LanguageModule):
    """One pipeline stage of the model; `forward` takes ModelInputs.

    What the classes of model.core share; each adds megatron-core's own class, and `forward`.
    """

    def __init__(
        self,
        *args: Any,
        rotary: ExplicitRotary,
        head_chunk_tokens: int,
        fuses_cross_entropy: bool,
        balance_clean_half: bool,
        routes_blocks: bool,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.rotary_pos_emb = rotary
        self.head_chunk_tokens = head_chunk_tokens
        self.fuses_cross_entropy = fuses_cross_entropy
        self.balance_clean_half = balance_clean_half
        self.routes_blocks = routes_blocks
        if self.post_process:
            reduce_input_gradient_once(self.output_layer)
        self.register_load_state_dict_post_hook(_want_no_extra_state)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Without `_extra_state`: empty fp8 scaling factors, of which each layer spec has others."""
        sharded = super().sharded_state_dict(*args, **kwargs)
        return {name: entry for name, entry in sharded.items() if "_extra_state" not in name}

    def _given(self, inputs: ModelInputs) -> dict[str, Any]:
        """GPTModel's arguments, of which HybridModel's layers take some."""
        S = inputs.tokens.shape[1]
        if self.fuses_cross_entropy:
            inputs = replace(inputs, readout=fused(inputs.readout))
        return {
            "input_ids": inputs.tokens,
            "position_ids": inputs.positions,
            "attention_mask": None,
            "decoder_input": self._embedded(inputs) if self.pre_process else None,
            "packed_seq_params": KeysParams(
                qkv_format="bshd",
                max_seqlen_q=S,
                max_seqlen_kv=S,
                keys=inputs.keys,
                angles=self.rotary_pos_emb(inputs.positions) if self.config.multi_latent_attention else None,
                drops_clean_rows=inputs.noisy_outputs,
            ),
            "padding_mask": self._marks(inputs),
            "output_processor": head_output,
            "output_processor_context": (inputs, self.head_chunk_tokens),
        }

    def _preprocess(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        decoder_input: torch.Tensor | None = None,
        padding_mask: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[Any, ...]:
        """What layers get, both in a forward and in a schedule plan: the embeddings and the marks as they are
        given, and the angles of the explicit positions, which layers of latent attention have from _given."""
        angles = None if self.config.multi_latent_attention else self.rotary_pos_emb(position_ids)
        return decoder_input, angles, None, None, None, padding_mask

    def _embedded(self, inputs: ModelInputs) -> torch.Tensor:
        """[S/tp, B, H], with noise and soft tokens."""
        embedded = self.embedding(input_ids=inputs.tokens, position_ids=None)
        if inputs.soft is not None:
            embedded = self._softened(embedded, inputs.soft)
        if inputs.noise is not None:
            embedded = embedded + self._noise(inputs.noise, inputs.tokens.shape[1], embedded)
        if not embedded.requires_grad and torch.is_grad_enabled():
            # A frozen table: what backward computes again would get no gradient for its own weights.
            embedded.requires_grad_()
        return embedded

    def _marks(self, inputs: ModelInputs) -> torch.Tensor | None:
        """What routers know of rows: bool [B, S/tp], True for those that the balance of experts leaves out,
        or with block routing what model/pools.py makes of it; None when all rows count alike.

        megatron-core carries it to every router as `padding_mask`; model/router.py gives it this meaning.
        """
        B, S = inputs.tokens.shape
        uncounted = None
        if not self.balance_clean_half and inputs.keys.mask.clean_copy:
            is_clean = torch.arange(S, device=inputs.tokens.device) >= S // 2
            uncounted = self._rows_here(is_clean, dim=0).expand(B, -1)
        if not self.routes_blocks:
            return uncounted
        blocks, bits = pools.row_blocks(inputs.keys.rectangle)
        here = sent(self._rows_here(torch.from_numpy(blocks), dim=1), inputs.tokens.device)
        return pools.marks(here, bits, uncounted)

    def _rows_here(self, rows: torch.Tensor, dim: int) -> torch.Tensor:
        """Of all rows along `dim` those that sequence parallelism gives to this rank."""
        if not self.config.sequence_parallel:
            return rows
        return rows.chunk(self.pg_collection.tp.size(), dim)[self.pg_collection.tp.rank()]

    def _softened(self, token_SBH: torch.Tensor, soft: SoftTokens) -> torch.Tensor:
        """w E[token] + (1 - w) E[mask], rescaled to the norm w |E[token]| + (1 - w) |E[mask]| (DMax, arXiv
        2604.08302); a row of weight 1 is its token's to the bit. Computed in fp32; like `token_SBH`.
        """
        tp = self.pg_collection.tp.size()
        masks = soft.weights.new_full((1, tp), soft.mask_token_id, dtype=torch.int64)
        mask_11H = self.embedding(input_ids=masks, position_ids=None)[:1].float()
        weight_SB1 = self._rows_here(soft.weights.t()[..., None], dim=0)
        token_part, mask_part = weight_SB1 * token_SBH.float(), (1 - weight_SB1) * mask_11H
        mixed_SBH = token_part + mask_part
        norms = [torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (token_part, mask_part)]
        norm_SB1 = torch.linalg.vector_norm(mixed_SBH, dim=-1, keepdim=True)
        mixed_SBH *= sum(norms) / norm_SB1.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.where(weight_SB1 == 1, token_SBH, mixed_SBH.to(token_SBH.dtype))

    def _noise(self, noise: EmbeddingNoise, S: int, embedded: torch.Tensor) -> torch.Tensor:
        """eps ~ N(0, sigma^2 I) at masked positions, zero elsewhere (LLaDA2.0, section 7.1); like `embedded`.

        Every rank draws the rows of all masked tokens of a sample and keeps its own, so that ranks which
        hold the same token add the same noise.
        """
        H = embedded.shape[-1]
        noise_SBH = embedded.new_zeros(S, embedded.shape[1], H)
        for b, (seed, drawn, rows) in enumerate(zip(noise.seeds, noise.drawn, noise.rows, strict=True)):
            eps = noise_rows(seed, drawn, H, embedded.device)
            if noise.places is not None:
                eps = eps.index_select(0, noise.places[b])
            noise_SBH[:, b].index_copy_(0, rows, (noise.sigma * eps).to(embedded.dtype))
        return self._rows_here(noise_SBH, dim=0)


class BlockDiffusionGPT(BlockDiffusionStage, GPTModel):
    """model.core=gpt."""

    def forward(self, inputs: ModelInputs) -> torch.Tensor:  # type: ignore[override]
        """Hidden states [S, B, H] of this stage; on the last one what `inputs.readout` says."""
        return super().forward(**self._given(inputs))

    def build_schedule_plan(self, inputs: ModelInputs) -> AbstractSchedulePlan:  # type: ignore[override]
        """The same forward in parts, between which megatron-core runs those of another one's backward.

        For layout.overlap_experts. Several may be in flight: all that a micro-batch brings is in its plan.
        """
        return super().build_schedule_plan(**self._given(inputs))


def layers_of(stage: torch.nn.Module) -> list[TransformerLayer]:
    """Those of a stage whose outputs are the model's layers': HybridModel has attention in one before."""
    layers = [module for module in stage.modules() if isinstance(module, TransformerLayer)]
    return [layer for layer in layers if not isinstance(layer.mlp, IdentityOp)]


def _want_no_extra_state(module: torch.nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
