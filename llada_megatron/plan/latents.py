"""Bytes that latent attention (model.mla) keeps, and widths that it gathers under tensor parallelism.

Legend as in activations.py; nh heads/tp, hd head_dim, Dr qk_rope_head_dim, Dv v_head_dim, Rq q_lora_rank, R
kv_lora_rank. Of megatron-core's local spec, whose way down to the latents is split over tp; TransformerEngine
has it whole on every process and gathers rows of latents alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.shapes import Shape


def attention_parts(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> dict[str, int]:
    """What a layer keeps, by part.

    norms      4t 1/rms of each latent
    attention  b S(Rq + R + Dr) latents before their norms (with tp > 1 a rank's rows are a view of all), with
               the rotated key; b t(Rq + R) after them; b S nh hd queries; b S nh Dv output; 4b rotary_rows Dr
               of cosines and sines for q and k
    core_attn  4 S nh log-sum-exp; b S nh (hd + Dv) keys and values, or b K nh (hd + Dv), the exchange's
               ordered copy
    """
    mla, S, t, nh = model.mla, shape.rows, shape.tokens, model.heads // layout.tp
    latents = mla.q_lora_rank + mla.kv_lora_rank
    heads = nh * (model.head_dim + mla.v_head_dim)
    return {
        "norms": 4 * t * (1 + (mla.q_lora_rank > 0)),
        "attention": b * (t * latents + S * (latents + mla.qk_rope_head_dim) + S * heads)
        + 4 * b * shape.rotary_rows * mla.qk_rope_head_dim,
        "core_attn": 4 * S * nh + b * (shape.keys if layout.cp > 1 else S) * heads,
    }


def recomputed_heads(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> tuple[int, int]:
    """What mla_up_proj drops of attention, and of core_attn.

    b S nh hd queries, with cosines and sines, less the rotated key that waits as an input: with tp > 1 it is
    a gathered tensor of its own, b S Dr; b S nh (hd + Dv) keys and values, where no exchange copied them.
    """
    mla, S, nh = model.mla, shape.rows, model.heads // layout.tp
    gathered_key = b * S * mla.qk_rope_head_dim if layout.tp > 1 else 0
    angles = 4 * b * shape.rotary_rows * mla.qk_rope_head_dim
    kept_here = 0 if layout.cp > 1 else b * S * nh * (model.head_dim + mla.v_head_dim)
    return b * S * nh * model.head_dim + angles - gathered_key, kept_here


def gathered_widths(model: ModelConfig) -> Iterator[tuple[int, int, int, int, str]]:
    """(width, gathers forward, gathers backward, scatters backward, module) over tp of rows [S, width].

    A linear layer gathers its input, again in backward, and scatters its gradient: hidden states for each way
    down, latents for the ways up. What a way down has split by width is gathered, and in backward its
    gradients are. The rotated key is gathered for all heads, and its gradients are scattered. The module is
    that of recompute.
    """
    H, mla, up = model.hidden_size, model.mla, "mla_up_proj"
    yield H, 1, 1, 1, "attention"
    yield mla.kv_lora_rank + mla.qk_rope_head_dim, 1, 1, 0, "attention"
    yield mla.qk_rope_head_dim, 1, 0, 1, "attention"
    yield mla.kv_lora_rank, 1, 1, 1, up
    yield H, 1, 1, 1, "attention" if mla.q_lora_rank else up
    if mla.q_lora_rank:
        yield mla.q_lora_rank, 1, 1, 0, "attention"
        yield mla.q_lora_rank, 1, 1, 1, up
