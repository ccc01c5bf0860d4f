"""A plain forward pass over Hugging Face tensors by their own names, sharing nothing with the tables.

It is what a certificate compares megatron-core's model with: causal attention, fp32, no cache, one sequence.
Legend: S positions, H hidden size, D head dim, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_megatron.checkpoint.shards import whole
from llada_megatron.convert.families.rotation import Rotation, rotated
from llada_megatron.convert.reference_files import ReferenceFiles

PROJECTIONS = ("gate", "up", "down")


class Forward:
    """Logits of a Llama, computed one layer at a time from the files; a subclass says what differs."""

    embedding = "model.embed_tokens"
    attention, output = "self_attn", "o_proj"
    """Names inside a layer: of its attention, and in that of the projection back."""

    def __init__(self, files: ReferenceFiles, config: dict[str, Any]) -> None:
        self.files, self.config = files, config
        self._heads = config["num_attention_heads"]
        self._kv_heads = config.get("num_key_value_heads") or self._heads
        self._head_dim = config.get("head_dim") or config["hidden_size"] // self._heads
        self._rotation = Rotation(config, self._head_dim)

    def logits(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """fp32 [S, vocabulary] of int64 tokens [S] at positions [S]."""
        cos, sin = self._rotation.cosines_and_sines(positions)
        embedding = self.get(f"{self.embedding}.weight")
        hidden_SH = embedding[tokens]
        for layer in range(self.config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            normed_SH = self.norm(f"{name}.input_layernorm", hidden_SH)
            hidden_SH = hidden_SH + self._attend(f"{name}.{self.attention}", normed_SH, cos, sin)
            normed_SH = self.norm(f"{name}.post_attention_layernorm", hidden_SH)
            hidden_SH = hidden_SH + self.feed_forward(f"{name}.mlp", normed_SH)
        head = embedding if self.config.get("tie_word_embeddings") else self.get("lm_head.weight")
        return self.norm("model.norm", hidden_SH) @ head.T

    def queries_keys_values(self, name: str, normed_SH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each [S, heads, D], before rotation."""
        query, key, value = (self.heads(normed_SH @ self.get(f"{name}.{p}_proj.weight").T) for p in "qkv")
        return query, key, value

    def feed_forward(self, name: str, normed_SH: Tensor) -> Tensor:
        """What a layer adds after attention, [S, H]."""
        return self.swiglu(normed_SH, *(self.get(f"{name}.{p}_proj.weight") for p in PROJECTIONS))

    def mixture(
        self, normed_SH: Tensor, weights_SE: Tensor, matrices: Callable[[int], Iterable[Tensor]]
    ) -> Tensor:
        """The experts' outputs times their weights, which are zero where one was not chosen."""
        output_SH = torch.zeros_like(normed_SH)
        for expert in range(weights_SE.shape[1]):
            chosen = weights_SE[:, expert].nonzero()[:, 0]
            if len(chosen):
                value = self.swiglu(normed_SH[chosen], *matrices(expert))
                output_SH[chosen] += weights_SE[chosen, expert, None] * value
        return output_SH

    def get(self, name: str) -> Tensor:
        """A whole tensor in fp32."""
        return self.files.read(whole(name, *self.files.tensors[name].shape)).float()

    def norm(self, name: str, values: Tensor) -> Tensor:
        """RMSNorm over the last dimension."""
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return values * scale * self.get(f"{name}.weight")

    def heads(self, rows: Tensor) -> Tensor:
        """[S, heads D] as [S, heads, D]."""
        return rows.unflatten(-1, (-1, self._head_dim))

    def swiglu(self, values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """A gated feed-forward layer of these matrices."""
        return (F.silu(values @ gate.T) * (values @ up.T)) @ down.T

    def _attend(self, name: str, normed_SH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = self.queries_keys_values(name, normed_SH)
        query, key = rotated(query, cos, sin), rotated(key, cos, sin)
        repeats = self._heads // self._kv_heads
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        scores = torch.einsum("shd,thd->hst", query, key) / self._head_dim**0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        mixed_SHD = torch.einsum("hst,thd->shd", weights, value)
        return mixed_SHD.flatten(1) @ self.get(f"{name}.{self.output}.weight").T
