"""megatron-core's HybridModel as the same model: each layer as two of its layers, under the same names.

HybridModel is a row of layers of one kind each, written as a pattern; a layer of ours is attention (`*`) and
then a dense feed-forward (`-`) or experts (`E`):

    index in the pattern          layer of the model, and its number in checkpoints and figures
    2 i     self_attention        i
    2 i + 1 mlp                   i
    final_norm                    final_layernorm

So a checkpoint knows nothing of model.core: what one class saves the other loads, moments included. Legend: S
rows, B batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.model.gpt import BlockDiffusionStage
from llada_megatron.model.inputs import ModelInputs

HALVES = 2
"""Layers of HybridModel that make one of the model."""
NO_ATTENTION = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}
NO_MLP = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}


def pattern(stages: Sequence[int], dense_layers: int) -> str:
    """HybridModel's row of layers; stages: layers of each (virtual) pipeline stage, the first ones dense."""
    layers = iter(["*-"] * dense_layers + ["*E"] * (sum(stages) - dense_layers))
    return "|".join("".join(next(layers) for _ in range(count)) for count in stages)


class _Next:
    """A layer by the next spec: HybridStack takes one of each kind, and two layers of a kind may differ."""

    def __new__(cls, *args: Any, specs: Iterator[ModuleSpec], **kwargs: Any) -> Any:
        return build_module(next(specs), *args, **kwargs)


def stack_spec(block: TransformerBlockSubmodules) -> ModuleSpec:
    """The halves of this stage's layers, in order."""
    halves = [
        replace(layer, submodules=replace(layer.submodules, **left_out))
        for layer in block.layer_specs
        for left_out in (NO_MLP, NO_ATTENTION)
    ]
    half = ModuleSpec(module=_Next, params={"specs": iter(halves)})
    kinds = HybridStackSubmodules(attention_layer=half, mlp_layer=half, moe_layer=half)
    return ModuleSpec(module=Stack, params={"norm": block.layer_norm}, submodules=kinds)


class Stack(HybridStack):
    """HybridModel's layers, numbered as the model's, with the last norm of our layer spec.

    HybridStack makes TransformerEngine's norm whatever the other layers are made of (hybrid_block.py:241).
    """

    def __init__(
        self, *args: Any, norm: Callable[..., torch.nn.Module], pp_layer_offset: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, pp_layer_offset=pp_layer_offset, post_layer_norm=False, **kwargs)
        for index, half in enumerate(self.layers, start=pp_layer_offset):
            for module in half.modules():
                if hasattr(module, "layer_number"):
                    module.layer_number = index // HALVES + 1
            if index % HALVES == 0:  # nothing to compute again
                half.recompute_mlp = False
        if self.post_process:
            self.post_layer_norm = True
            self.final_layernorm = norm(
                config=self.config,
                hidden_size=self.config.hidden_size,
                eps=self.config.layernorm_epsilon,
            )

    @property
    def final_norm(self) -> torch.nn.Module:
        """HybridStack's name of `final_layernorm`."""
        return self.final_layernorm


class BlockDiffusionHybrid(BlockDiffusionStage, HybridModel):
    """model.core=hybrid.

    block: the layers of this stage, as GPTModel takes them; stages: layers of each (virtual) stage.
    """

    def __init__(
        self,
        config: TransformerConfig,
        block: TransformerBlockSubmodules,
        *,
        stages: Sequence[int],
        dense_layers: int,
        **options: Any,
    ) -> None:
        layers = pattern(stages, dense_layers)
        super().__init__(config, stack_spec(block), hybrid_layer_pattern=layers, **options)

    def forward(self, inputs: ModelInputs) -> torch.Tensor:  # type: ignore[override]
        """Hidden states [S, B, H] of this stage; on the last one what `inputs.readout` says.

        HybridModel's own forward knows neither positions that are given nor an `output_processor`.
        """
        given = self._given(inputs)
        names = ("input_ids", "position_ids", "decoder_input", "padding_mask")
        embedded_SBH, angles, *_, marks = self._preprocess(**{name: given[name] for name in names})
        hidden_SBH = self.decoder(
            hidden_states=embedded_SBH,
            attention_mask=None,
            rotary_pos_emb=angles,
            packed_seq_params=given["packed_seq_params"],
            padding_mask=marks,
        )
        if not self.post_process:
            return hidden_SBH
        tied = self.share_embeddings_and_output_weights
        return given["output_processor"](
            hidden_states=hidden_SBH,
            output_layer=self.output_layer,
            output_weight=self.shared_embedding_or_output_weight() if tied else None,
            context=given["output_processor_context"],
            config=self.config,
        )
