"""A small set of golden cases as others may write it: a dense Llama, computed here in plain PyTorch.

It stores less than our own sets (no routing, no mask, no intermediate states), gradients that are exactly
zero, and things that nobody here knows.
"""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY, MASK = 16, 4, 2, 4, 24, 32, 31
LENGTH, BLOCK = 8, 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "num_hidden_layers": 1,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "rms_norm_eps": 1e-6,
    "rope_theta": 100.0,
    "vocab_size": VOCABULARY,
    "torch_dtype": "float32",
}
LAYER = "model.layers.0"
SHAPES = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    f"{LAYER}.input_layernorm.weight": (HIDDEN,),
    f"{LAYER}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, HIDDEN),
    f"{LAYER}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    f"{LAYER}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    f"{LAYER}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
    f"{LAYER}.post_attention_layernorm.weight": (HIDDEN,),
    f"{LAYER}.mlp.gate_proj.weight": (WIDTH, HIDDEN),
    f"{LAYER}.mlp.up_proj.weight": (WIDTH, HIDDEN),
    f"{LAYER}.mlp.down_proj.weight": (HIDDEN, WIDTH),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}
ZERO = f"{LAYER}.mlp.up_proj.weight"
"""Its gradient is zero, since `down_proj` is."""


def rotated(heads_SHD: Tensor, positions: Tensor) -> Tensor:
    half = HEAD_DIM // 2
    angles = (positions[:, None] * CONFIG["rope_theta"] ** (-torch.arange(half) / half))[:, None]
    first, second = heads_SHD.split(half, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def logits(weights: dict[str, Tensor], tokens: Tensor, positions: Tensor, allowed: Tensor) -> Tensor:
    """[S, vocabulary] of tokens [S] that see each other where `allowed` [S, S] is true."""

    def norm(name: str, values: Tensor) -> Tensor:
        return values * (values.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weights[f"{name}.weight"]

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ weights[f"{LAYER}.{name}.weight"].T

    hidden = weights["model.embed_tokens.weight"][tokens]
    normed = norm(f"{LAYER}.input_layernorm", hidden)
    query, key, value = (
        linear(f"self_attn.{part}_proj", normed).unflatten(-1, (-1, HEAD_DIM)) for part in "qkv"
    )
    query, key = rotated(query, positions), rotated(key, positions)
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (key, value))
    scores = torch.einsum("shd,thd->hst", query, key) / HEAD_DIM**0.5
    attended = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    hidden = hidden + linear("self_attn.o_proj", torch.einsum("hst,thd->shd", attended, value).flatten(1))
    normed = norm(f"{LAYER}.post_attention_layernorm", hidden)
    fed = F.silu(linear("mlp.gate_proj", normed)) * linear("mlp.up_proj", normed)
    hidden = hidden + linear("mlp.down_proj", fed)
    return norm("model.norm", hidden) @ weights["lm_head.weight"].T


def diffusion_loss(weights: dict[str, Tensor], clean_BL: Tensor, noisy_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropies [B, L], zero where nothing is masked, and their sum over all tokens."""
    block = torch.arange(LENGTH) // BLOCK
    same, before = block[:, None] == block, block[:, None] > block
    allowed = torch.cat([torch.cat([same, before], 1), torch.cat([torch.zeros_like(same), same | before], 1)])
    positions = torch.arange(LENGTH).repeat(2)
    found = []
    for clean, noisy in zip(clean_BL, noisy_BL, strict=True):
        predicted = logits(weights, torch.cat([noisy, clean]), positions, allowed)[:LENGTH]
        entropy = F.cross_entropy(predicted, clean, reduction="none")
        found.append(torch.where(noisy == MASK, entropy, 0.0))
    return torch.stack(found), torch.stack(found).sum() / clean_BL.numel()


def write_set(folder: Path) -> Path:
    """The set in a new folder."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator) * 0.5 for name, shape in SHAPES.items()}
    weights[f"{LAYER}.mlp.down_proj.weight"].zero_()
    tokens = torch.randint(MASK, (2, LENGTH), generator=generator)
    noisy = torch.where(torch.rand(2, LENGTH, generator=generator) < 0.6, MASK, tokens)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
    entropies, loss = diffusion_loss(leaves, tokens, noisy)
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items()}
    everywhere = torch.ones(LENGTH, LENGTH, dtype=torch.bool)
    stored = {
        "full.input_ids": tokens[0],
        "full.position_ids": torch.arange(LENGTH),
        "full.logits": logits(weights, tokens[0], torch.arange(LENGTH), everywhere),
        "full.attention_entropy": torch.zeros(HEADS),
        "theirs.prompt": tokens[1],
        "loss.flat.input_ids": tokens,
        "loss.flat.noisy_input_ids": noisy,
        "loss.flat.labels": tokens,
        "loss.flat.t": torch.full((2,), 0.6),
        "loss.flat.per_token_ce": entropies.detach(),
        "loss.theirs.input_ids": tokens,
        f"grad.flat.{ZERO}": gradients[ZERO],
        "grad.flat.model.layers.0.self_attn.q_proj.weight": gradients[f"{LAYER}.self_attn.q_proj.weight"],
        "grad.flat.model.layers.7.mlp.up_proj.weight": torch.zeros(WIDTH, HIDDEN),
    }
    described = {
        "mask_token_id": MASK,
        "cases": {"full": {"kind": "mdlm"}, "theirs": {"kind": "likelihood"}},
        "losses": {
            "flat": {
                "total_loss": float(loss),
                "block_size": BLOCK,
                "loss_weight_type": "uniform",
                "loss_norm_type": "token",
                "grad_norms": {ZERO: 0.0, "lm_head.weight": float(gradients["lm_head.weight"].norm())},
            },
            "theirs": {"loss_weight_type": "cosine", "loss_norm_type": "token", "block_size": BLOCK},
        },
        "preferences": {"dpo": {}},
    }
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    cases = {name: tensor.detach().clone() for name, tensor in stored.items()}
    save_file(cases, folder / "cases.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "cases.json").write_text(json.dumps(described))
    return folder
