"""A plain forward pass over Hugging Face tensors by their own names, sharing nothing with the tables.

It is what a certificate compares megatron-core's model with: causal attention, fp32, no cache, one sequence.
Legend: S positions, H hidden size, D head dim, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llada_megatron.checkpoint.shards import whole
from llada_megatron.convert.mapping import expert_rows
from llada_megatron.convert.safetensors_files import SafetensorsReader


class Reference:
    """Logits of BailingMoeV2, LLaDA2 and Llama, computed one layer at a time from the files."""

    def __init__(self, files: SafetensorsReader, config: dict[str, Any]) -> None:
        self._files, self._config = files, config
        parameters = config.get("rope_parameters") or {}
        self._llama = "model.embed_tokens.weight" in files.tensors
        self._heads = config["num_attention_heads"]
        self._kv_heads = config.get("num_key_value_heads") or self._heads
        self._head_dim = config.get("head_dim") or config["hidden_size"] // self._heads
        self._theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
        self._rotated = int(self._head_dim * config.get("partial_rotary_factor", 1.0))

    def logits(self, tokens: Tensor) -> Tensor:
        """fp32 [S, vocabulary] of int64 tokens [S]."""
        embedding = self._get("model.embed_tokens.weight" if self._llama else "model.word_embeddings.weight")
        hidden_SH = embedding[tokens]
        for layer in range(self._config["num_hidden_layers"]):
            name = f"model.layers.{layer}"
            hidden_SH = hidden_SH + self._attention(name, self._norm(f"{name}.input_layernorm", hidden_SH))
            normed_SH = self._norm(f"{name}.post_attention_layernorm", hidden_SH)
            hidden_SH = hidden_SH + self._feed_forward_or_experts(f"{name}.mlp", layer, normed_SH)
        head = embedding if self._config.get("tie_word_embeddings") else self._get("lm_head.weight")
        return self._norm("model.norm", hidden_SH) @ head.T

    def _get(self, name: str) -> Tensor:
        return self._files.read(whole(name, *self._files.tensors[name].shape)).float()

    def _norm(self, name: str, values: Tensor) -> Tensor:
        scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + self._config["rms_norm_eps"])
        return values * scale * self._get(f"{name}.weight")

    def _attention(self, layer: str, normed_SH: Tensor) -> Tensor:
        D, q_rows, kv_rows = self._head_dim, self._heads * self._head_dim, self._kv_heads * self._head_dim
        if self._llama:
            source, output = f"{layer}.self_attn", "o_proj"
            query, key, value = (normed_SH @ self._get(f"{source}.{p}_proj.weight").T for p in "qkv")
        else:
            source, output = f"{layer}.attention", "dense"
            joined = normed_SH @ self._get(f"{source}.query_key_value.weight").T
            query, key, value = joined.split([q_rows, kv_rows, kv_rows], dim=-1)
        query, key, value = (part.unflatten(-1, (-1, D)) for part in (query, key, value))  # [S, heads, D]
        if f"{source}.query_layernorm.weight" in self._files.tensors:
            query = self._norm(f"{source}.query_layernorm", query)
            key = self._norm(f"{source}.key_layernorm", key)
        query, key = self._rotate(query), self._rotate(key)
        repeats = self._heads // self._kv_heads
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        scores = torch.einsum("shd,thd->hst", query, key) / D**0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return (
            torch.einsum("hst,thd->shd", weights, value).flatten(1) @ self._get(f"{source}.{output}.weight").T
        )

    def _rotate(self, heads_SHD: Tensor) -> Tensor:
        half = self._rotated // 2
        frequencies = self._theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = (torch.arange(len(heads_SHD)).float()[:, None] * frequencies)[:, None]
        first, second, rest = heads_SHD.split([half, half, self._head_dim - 2 * half], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def _feed_forward_or_experts(self, name: str, layer: int, normed_SH: Tensor) -> Tensor:
        if f"{name}.gate.weight" not in self._files.tensors:
            return self._swiglu(normed_SH, *(self._get(f"{name}.{p}_proj.weight") for p in PROJECTIONS))
        weights_SE = self._routing(name, normed_SH)
        output_SH = torch.zeros_like(normed_SH)
        for expert in range(weights_SE.shape[1]):
            chosen = weights_SE[:, expert].nonzero()[:, 0]
            if len(chosen):
                value = self._swiglu(normed_SH[chosen], *self._expert(name, expert))
                output_SH[chosen] += weights_SE[chosen, expert, None] * value
        if f"{name}.shared_experts.gate_proj.weight" in self._files.tensors:
            shared = (self._get(f"{name}.shared_experts.{p}_proj.weight") for p in PROJECTIONS)
            output_SH = output_SH + self._swiglu(normed_SH, *shared)
        return output_SH

    def _expert(self, name: str, expert: int) -> tuple[Tensor, ...]:
        if f"{name}.experts.gate_proj" in self._files.tensors:
            return tuple(self._expert_of_stack(f"{name}.experts.{p}_proj", expert) for p in PROJECTIONS)
        return tuple(self._get(f"{name}.experts.{expert}.{p}_proj.weight") for p in PROJECTIONS)

    def _expert_of_stack(self, name: str, expert: int) -> Tensor:
        shape = self._files.tensors[name].shape
        return self._files.read(expert_rows(name, shape, expert, 0, shape[1]))[0].float()

    def _swiglu(self, values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return (F.silu(values @ gate.T) * (values @ up.T)) @ down.T

    def _routing(self, name: str, normed_SH: Tensor) -> Tensor:
        """fp32 [S, E]: the combine weight of chosen experts, zero elsewhere."""
        config = self._config
        scores = (normed_SH @ self._get(f"{name}.gate.weight").T).sigmoid()
        biased = scores
        if f"{name}.gate.expert_bias" in self._files.tensors:
            biased = scores + self._get(f"{name}.gate.expert_bias")
        groups = biased.unflatten(-1, (config["n_group"], -1))
        best = (
            groups.topk(min(2, groups.shape[-1]), dim=-1)
            .values.sum(-1)
            .topk(config["topk_group"], dim=-1)
            .indices
        )
        closed = torch.ones(groups.shape[:-1], dtype=torch.bool).scatter(-1, best, False)
        open_scores = groups.masked_fill(closed[..., None], float("-inf")).flatten(-2)
        chosen = open_scores.topk(config["num_experts_per_tok"], dim=-1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * config.get("routed_scaling_factor", 1.0)
        return torch.zeros_like(scores).scatter(-1, chosen, weights)


PROJECTIONS = ("gate", "up", "down")
