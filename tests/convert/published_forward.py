"""Logits of public checkpoints in float64, written from their published descriptions for the tests alone.

Everything that tells the families apart is spelt out in LAYOUTS; nothing is shared with the package.

Legend: S tokens, H hidden size, D head dim, n heads, V vocabulary, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Names of a family's tensors and of its numbers in config.json."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    attention_norm: str = "input_layernorm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    mlp_norm: str = "post_attention_layernorm"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    hidden: str = "hidden_size"
    layers: str = "num_hidden_layers"
    tied: str = "tie_word_embeddings"


STANDARD = Layout()
LLADA = Layout(
    embedding="model.transformer.wte",
    layer="model.transformer.blocks.{}",
    attention_norm="attn_norm",
    **{name: f"{name}_proj" for name in ("q", "k", "v")},
    o="attn_out",
    mlp_norm="ff_norm",
    gate="ff_proj",
    up="up_proj",
    down="ff_out",
    final_norm="model.transformer.ln_f",
    head="model.transformer.ff_out",
    heads="n_heads",
    kv_heads="n_kv_heads",
    hidden="d_model",
    layers="n_layers",
    tied="weight_tying",
)


def logits(
    weights: dict[str, Tensor], config: dict, tokens: Tensor, *, causal: bool, layout: Layout = STANDARD
) -> Tensor:
    """float64 [S, V] of int64 tokens [S] at positions 0..S-1, each seeing all or those up to itself."""
    wide = {name: tensor.double() for name, tensor in weights.items()}
    hidden_SH = wide[f"{layout.embedding}.weight"][tokens]
    for number in range(config[layout.layers]):
        prefix = layout.layer.format(number) + "."
        layer = {name.removeprefix(prefix): wide[name] for name in wide if name.startswith(prefix)}
        normed_SH = rms_norm(hidden_SH, layer[f"{layout.attention_norm}.weight"], config)
        hidden_SH = hidden_SH + attention(layer, config, normed_SH, causal, layout)
        normed_SH = rms_norm(hidden_SH, layer[f"{layout.mlp_norm}.weight"], config)
        hidden_SH = hidden_SH + mlp(layer, config, normed_SH, layout)
    head = layout.embedding if config.get(layout.tied) else layout.head
    return rms_norm(hidden_SH, wide[f"{layout.final_norm}.weight"], config) @ wide[f"{head}.weight"].T


def rms_norm(values: Tensor, weight: Tensor, config: dict) -> Tensor:
    return values / (values.pow(2).mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * weight


def attention(layer: dict, config: dict, normed_SH: Tensor, causal: bool, layout: Layout) -> Tensor:
    n, D = config[layout.heads], config.get("head_dim") or config[layout.hidden] // config[layout.heads]
    q_nSD, k_gSD, v_gSD = (
        (normed_SH @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0))
        .unflatten(1, (-1, D))
        .transpose(0, 1)
        for name in (layout.q, layout.k, layout.v)
    )
    if "self_attn.q_norm.weight" in layer:
        q_nSD = rms_norm(q_nSD, layer["self_attn.q_norm.weight"], config)
        k_gSD = rms_norm(k_gSD, layer["self_attn.k_norm.weight"], config)
    q_nSD, k_gSD = rotated(q_nSD, config["rope_theta"]), rotated(k_gSD, config["rope_theta"])
    of_head = torch.arange(n) // (n // config[layout.kv_heads])
    scores_nSS = q_nSD @ k_gSD[of_head].transpose(1, 2) / D**0.5
    if causal:
        scores_nSS = scores_nSS + torch.full_like(scores_nSS[0], -torch.inf).triu(1)
    mixed_nSD = scores_nSS.softmax(-1) @ v_gSD[of_head]
    return mixed_nSD.transpose(0, 1).flatten(1) @ layer[f"{layout.o}.weight"].T


def rotated(heads_nSD: Tensor, theta: float) -> Tensor:
    """Channel i and i + D/2 are a complex number, turned by position * theta^(-2i/D)."""
    S, D = heads_nSD.shape[1:]
    angle_Si = torch.arange(S).double()[:, None] * theta ** (-torch.arange(0, D, 2).double() / D)
    complex_nSi = torch.complex(*heads_nSD.chunk(2, dim=-1)) * torch.exp(1j * angle_Si)
    return torch.cat([complex_nSi.real, complex_nSi.imag], dim=-1)


def mlp(layer: dict, config: dict, normed_SH: Tensor, layout: Layout) -> Tensor:
    if "mlp.gate.weight" not in layer:
        return swiglu(normed_SH, *(layer[f"{name}.weight"] for name in (layout.gate, layout.up, layout.down)))
    share_SE = (normed_SH @ layer["mlp.gate.weight"].T).softmax(-1)
    best_Sk = share_SE.topk(config["num_experts_per_tok"], dim=-1).indices
    kept_SE = torch.zeros_like(share_SE).scatter(1, best_Sk, share_SE.gather(1, best_Sk))
    if config.get("norm_topk_prob"):
        kept_SE = kept_SE / kept_SE.sum(-1, keepdim=True)
    names = ("gate_proj", "up_proj", "down_proj")
    outputs_ESH = torch.stack(
        [
            swiglu(normed_SH, *(layer[f"mlp.experts.{expert}.{name}.weight"] for name in names))
            for expert in range(share_SE.shape[1])
        ]
    )
    return torch.einsum("se,esh->sh", kept_SE, outputs_ESH)


def swiglu(values: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = values @ gate.T
    return (gated * gated.sigmoid() * (values @ up.T)) @ down.T
