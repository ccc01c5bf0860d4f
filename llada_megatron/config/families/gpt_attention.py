"""Attention of the `gpt` family: queries in groups that share keys, or one latent per token (model.mla).

Legend: H hidden_size, nh heads, ng kv_heads, hd head_dim; with model.mla Rq q_lora_rank, R kv_lora_rank, Dn
qk_nope_head_dim, Dr qk_rope_head_dim, hd = Dn + Dr, Dv v_head_dim.

    grouped     queries, keys, values   H (nh + 2 ng) hd             / tp
                qkv_bias                (nh + 2 ng) hd               / tp
                output                  nh hd H                      / tp
                qk_norm                 2 hd                         replicated over tp
    model.mla   queries                 H Rq + Rq nh hd, or H nh hd  / tp
                keys and values         H (R + Dr) + R nh (Dn + Dv)  / tp
                output                  nh Dv H                      / tp
                norms of the latents    Rq + R                       replicated over tp
"""

from __future__ import annotations

from dataclasses import fields

from llada_megatron.config.choices import AdapterTarget, RotaryScaling
from llada_megatron.config.layout_rules import require
from llada_megatron.config.schema import ModelConfig


def check_attention(model: ModelConfig) -> None:
    """Raise BadInput for heads and latents that cannot be built."""
    require(
        model.heads % model.kv_heads == 0,
        f"model.heads={model.heads} is not a multiple of model.kv_heads={model.kv_heads}.",
    )
    if model.mla.is_used:
        _check_latents(model)
        return
    for each in fields(model.mla):
        size = getattr(model.mla, each.name)
        require(
            not size,
            f"model.mla.{each.name}={size} means nothing with model.mla.kv_lora_rank=0: set both or none.",
        )
    require(
        model.rotary_fraction <= 1 and model.rotated_channels in range(2, 2**31, 2),
        f"model.rotary_fraction={model.rotary_fraction} of model.head_dim={model.head_dim} must be an even"
        " number of channels.",
    )
    scale = model.rotary_scaling.mscale_all_dim
    require(
        not scale,
        f"model.rotary_scaling.mscale_all_dim={scale} changes softmax's scale of model.mla alone: set 0.",
    )


def _check_latents(model: ModelConfig) -> None:
    mla, scaling = model.mla, model.rotary_scaling
    for name in ("qk_nope_head_dim", "v_head_dim"):
        require(getattr(mla, name) > 0, f"model.mla.{name} is 0: model.mla.kv_lora_rank above 0 needs it.")
    require(
        mla.qk_rope_head_dim in range(2, 2**31, 2),
        f"model.mla.qk_rope_head_dim={mla.qk_rope_head_dim} must be an even number of channels, 2 or more.",
    )
    width = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    for name, value, wanted in (
        ("kv_heads", model.kv_heads, model.heads),
        ("head_dim", model.head_dim, width),
        ("rotary_fraction", model.rotary_fraction, 1.0),
        ("qk_norm", model.qk_norm, True),
        ("qkv_bias", model.qkv_bias, False),
    ):
        said = str(wanted).lower()
        require(
            value == wanted, f"model.{name}={str(value).lower()} must be {said} with model.mla: set it so."
        )
    require(
        not (model.lora.rank and AdapterTarget.attention in model.lora.targets),
        "model.lora.targets has attention, beside whose latents (model.mla) no adapter stands: leave it out.",
    )
    require(
        not scaling.mscale_all_dim or scaling.type is RotaryScaling.yarn,
        f"model.rotary_scaling.mscale_all_dim={scaling.mscale_all_dim} belongs to type=yarn, not"
        f" {scaling.type}: set it to 0.",
    )


def attention_matrices(model: ModelConfig) -> list[int]:
    """Elements of each matrix of a layer's attention; tensor parallelism splits all of them."""
    H, nh, hd, mla = model.hidden_size, model.heads, model.head_dim, model.mla
    if not mla.is_used:
        return [H * (nh + 2 * model.kv_heads) * hd, nh * hd * H]
    queries = [H * mla.q_lora_rank, mla.q_lora_rank * nh * hd] if mla.q_lora_rank else [H * nh * hd]
    down = H * (mla.kv_lora_rank + mla.qk_rope_head_dim)
    up = mla.kv_lora_rank * nh * (mla.qk_nope_head_dim + mla.v_head_dim)
    return [*queries, down, up, nh * mla.v_head_dim * H]


def attention_norms(model: ModelConfig) -> list[int]:
    """Elements of each norm inside a layer's attention, whole on every tensor-parallel process."""
    if model.mla.is_used:
        return [rank for rank in (model.mla.q_lora_rank, model.mla.kv_lora_rank) if rank]
    return [model.head_dim] * 2 if model.qk_norm else []


def attention_weights(model: ModelConfig) -> int:
    """Of one layer's matrices."""
    return sum(attention_matrices(model))


def up_weights(model: ModelConfig) -> int:
    """Those of a layer's that make queries, keys and values of heads out of latents; 0 without model.mla."""
    if not model.mla.is_used:
        return 0
    nh, mla = model.heads, model.mla
    queries = (mla.q_lora_rank or model.hidden_size) * nh * model.head_dim
    return queries + mla.kv_lora_rank * nh * (mla.qk_nope_head_dim + mla.v_head_dim)


def attention_widths(model: ModelConfig) -> tuple[int, int]:
    """Channels that a layer's products read, and give, beside hidden states at its begin and end."""
    queries, mla = model.heads * model.head_dim, model.mla
    if not mla.is_used:
        return queries, queries + 2 * model.kv_heads * model.head_dim
    values, down = model.heads * mla.v_head_dim, mla.q_lora_rank + mla.kv_lora_rank
    up = queries + model.heads * mla.qk_nope_head_dim + values
    return down + values, down + mla.qk_rope_head_dim + up


def qkv_biases(model: ModelConfig) -> int:
    """Of one layer."""
    return (model.heads + 2 * model.kv_heads) * model.head_dim if model.qkv_bias else 0


def pair_flops(model: ModelConfig) -> int:
    """Forward FLOPs of a visible query-key pair in all layers: of each head 2 hd a score, 2 Dv a value."""
    return 2 * model.heads * (model.head_dim + model.value_dim) * model.layers


def decoding_pair_flops(model: ModelConfig) -> int:
    """The same of decoding, where heads meet latents: 2 (R + Dr) its score, 2 R what becomes its value."""
    if not model.mla.is_used:
        return pair_flops(model)
    latent, rope = model.mla.kv_lora_rank, model.mla.qk_rope_head_dim
    return 2 * model.heads * (2 * latent + rope) * model.layers


def kept_numbers(model: ModelConfig, tp: int = 1) -> int:
    """What decoding keeps of a token in all layers on a process: a key and a value of each of its kv heads.

    With model.mla the latent and the rotated key, which all heads share, R + Dr on every process.
    """
    if model.mla.is_used:
        return model.layers * (model.mla.kv_lora_rank + model.mla.qk_rope_head_dim)
    return 2 * model.layers * model.kv_heads * model.head_dim // tp
