"""Logits of DeepSeek-V3 in float64, written from its report (arXiv 2412.19437, equations 1 to 20).

Nothing is shared with the package. Legend: S tokens, n heads, c latents, R and C rotated parts, V values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.convert.published_forward import rms_norm, swiglu


def logits(weights: dict[str, Tensor], config: dict, tokens: Tensor, *, causal: bool) -> Tensor:
    """float64 [S, V] of int64 tokens [S] at positions 0..S-1, each seeing all or those up to itself."""
    wide = {name: tensor.double() for name, tensor in weights.items()}
    hidden_SH = wide["model.embed_tokens.weight"][tokens]
    for number in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{number}."
        layer = {name.removeprefix(prefix): wide[name] for name in wide if name.startswith(prefix)}
        normed_SH = rms_norm(hidden_SH, layer["input_layernorm.weight"], config)
        hidden_SH = hidden_SH + attention(layer, config, normed_SH, causal)
        normed_SH = rms_norm(hidden_SH, layer["post_attention_layernorm.weight"], config)
        if number < config["first_k_dense_replace"]:
            hidden_SH = hidden_SH + expert(layer, "mlp", normed_SH)
        else:
            if config["n_shared_experts"]:
                hidden_SH = hidden_SH + expert(layer, "mlp.shared_experts", normed_SH)
            hidden_SH = hidden_SH + mixture(layer, config, normed_SH)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return rms_norm(hidden_SH, wide["model.norm.weight"], config) @ wide[head].T


def attention(layer: dict, config: dict, h_SH: Tensor, causal: bool) -> Tensor:
    n, nope, rope = (config[k] for k in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))

    def of(name: str, values: Tensor) -> Tensor:
        return values @ layer[f"self_attn.{name}.weight"].T

    joined = of("kv_a_proj_with_mqa", h_SH)
    c_kv = rms_norm(joined[:, : config["kv_lora_rank"]], layer["self_attn.kv_a_layernorm.weight"], config)
    k_R = turned(joined[:, config["kv_lora_rank"] :], config)  # one for all heads
    up = of("kv_b_proj", c_kv).reshape(len(h_SH), n, nope + config["v_head_dim"])
    if config["q_lora_rank"]:
        c_q = rms_norm(of("q_a_proj", h_SH), layer["self_attn.q_a_layernorm.weight"], config)
        q = of("q_b_proj", c_q).reshape(len(h_SH), n, nope + rope)
    else:
        q = of("q_proj", h_SH).reshape(len(h_SH), n, nope + rope)
    scale, factor = (nope + rope) ** -0.5, (config["rope_scaling"] or {}).get("factor", 1)
    scale *= (0.1 * (config["rope_scaling"] or {}).get("mscale_all_dim", 0) * math.log(factor) + 1) ** 2
    heads = []
    for i in range(n):
        k = torch.cat([up[:, i, :nope], k_R], dim=1)
        q_i = torch.cat([q[:, i, :nope], turned(q[:, i, nope:], config)], dim=1)
        scores = q_i @ k.T * scale
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        heads.append(scores.softmax(-1) @ up[:, i, nope:])
    return of("o_proj", torch.cat(heads, dim=1))


def turned(values_SC: Tensor, config: dict) -> Tensor:
    """Channels 2i and 2i + 1 are a complex number, turned by position times YaRN's frequency i."""
    S, C = values_SC.shape
    base, yarn = config["rope_theta"], config["rope_scaling"]
    turns = []
    for i in range(C // 2):
        frequency = base ** (-2 * i / C)
        if yarn:
            ends = [
                C
                * math.log(yarn["original_max_position_embeddings"] / (times * 2 * math.pi))
                / (2 * math.log(base))
                for times in (yarn["beta_fast"], yarn["beta_slow"])
            ]
            low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), C - 1)
            slow = min(max((i - low) / max(high - low, 0.001), 0), 1)
            frequency = frequency / yarn["factor"] * slow + frequency * (1 - slow)
        turns.append(torch.polar(torch.ones(S).double(), torch.arange(S).double() * frequency))
    return torch.view_as_real(
        torch.complex(values_SC[:, 0::2], values_SC[:, 1::2]) * torch.stack(turns, 1)
    ).flatten(1)


def expert(layer: dict, name: str, h_SH: Tensor) -> Tensor:
    return swiglu(h_SH, *(layer[f"{name}.{each}_proj.weight"] for each in ("gate", "up", "down")))


def mixture(layer: dict, config: dict, h_SH: Tensor) -> Tensor:
    """Of each token's best groups, by their two best biased experts, the best biased experts."""
    output_SH = torch.zeros_like(h_SH)
    s_SE = (h_SH @ layer["mlp.gate.weight"].T).sigmoid()
    biased_SE = s_SE + layer["mlp.gate.e_score_correction_bias"]
    size = s_SE.shape[1] // config["n_group"]
    for t, (s, biased) in enumerate(zip(s_SE, biased_SE.tolist(), strict=True)):
        groups = [biased[g * size : (g + 1) * size] for g in range(config["n_group"])]
        best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: config["topk_group"]]
        open_experts = [e for e in range(len(biased)) if e // size in best]
        chosen = sorted(open_experts, key=lambda e: -biased[e])[: config["num_experts_per_tok"]]
        for e in chosen:
            gate = s[e] / s[chosen].sum() * config["routed_scaling_factor"]
            output_SH[t] += gate * expert(layer, f"mlp.experts.{e}", h_SH[t : t + 1])[0]
    return output_SH
