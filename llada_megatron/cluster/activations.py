"""Bytes that a layer keeps for its backward pass, and what recompute drops of them.

Legend, per process and micro-batch (shapes.py): S rows, t = S/tp tokens, N routed copies, n supervised rows,
K keys; H hidden size, F and Fe and Fs widths, q = heads*head_dim/tp and g = kv_heads*head_dim/tp channels, k
experts per token, E experts, V vocabulary, r rotated channels of a head; b bytes of an element.

The formulas are those of megatron-core 0.19.2's local spec with this project's attention, router and head.
Three contracts are assumed of kernels: RMSNorm keeps its input and an fp32 1/rms per row, attention keeps
its inputs, its output and an fp32 log-sum-exp per row and head, and rotary keeps cosines and sines. On a CPU
plain operations keep more. TransformerEngine's modules keep the same tensors where they are documented; for
that spec the figures are an estimate.
"""

from __future__ import annotations

from llada_megatron.cluster.shapes import Shape
from llada_megatron.config.schema import LayoutConfig, ModelConfig, Recompute

Parts = dict[str, int]
"""Bytes by part of a layer: residual, norms, attention, core_attn, mlp, shared_experts, experts, router."""


def layer_parts(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, moe: bool, b: int) -> Parts:
    """What one layer keeps without recompute.

    residual   2 b tH: the sum after attention, and the layer's output (the next layer's input)
    norms      2 b tH outputs, 8t 1/rms; with qk_norm 4S (heads + kv_heads)/tp more 1/rms
    attention  b S(q + 2g) projections; b Sq of queries copied out of them where g holds several kv heads;
               b Sq rotated queries; b Sq output; 4b rotary_rows r of cosines and sines for q and k
    core_attn  4S heads/tp log-sum-exp; keys and values: b Sg rotated keys (values are a view of the
               projections), or with context parallelism 2b Kg, the exchange's ordered copy
    mlp        b S F/tp (2 gate and up, 1 product): SwiGLU is fused (bias_activation_fusion)
    experts    b NH inputs; b N Fe/etp (2 gate and up, 1 weighted product)
    router     tE (8 + 4 + 4 + 1): sorted indices int64, sigmoid, scattered probabilities, map;
               t(24k + 4): chosen and remaining indices, their scores and probabilities, their sum
    """
    S, t, N, tp = shape.rows, shape.tokens, shape.routed, layout.tp
    hidden, head_dim = model.hidden_size, model.head_dim
    q, g = model.heads * head_dim // tp, model.kv_heads * head_dim // tp
    norm_rows = S * (model.heads + model.kv_heads) // tp if model.qk_norm else 0
    copied_queries = b * S * q if model.qk_norm and model.kv_heads // tp > 1 else 0
    rotary = 4 * b * shape.rotary_rows * int(head_dim * model.rotary_fraction)
    parts = {
        "residual": 2 * b * t * hidden,
        "norms": 2 * b * t * hidden + 8 * t + 4 * norm_rows,
        "attention": b * S * (q + 2 * g) + copied_queries + 2 * b * S * q + rotary,
        "core_attn": 4 * S * model.heads // tp + (2 * b * shape.keys * g if layout.cp > 1 else b * S * g),
    }
    if not moe:
        parts["mlp"] = 3 * b * S * model.ffn_hidden_size // tp
        return parts
    k = model.experts_per_token
    parts["shared_experts"] = 3 * b * S * model.shared_expert_hidden_size // tp
    parts["experts"] = b * N * (hidden + 3 * model.expert_hidden_size // layout.etp)
    parts["router"] = 17 * t * model.experts + t * (24 * k + 4)
    return parts


def recomputed_modules(layout: LayoutConfig) -> frozenset[str]:
    """Modules whose forward runs again in backward, in the words of layout.recompute_modules."""
    if layout.recompute is Recompute.none:
        return frozenset()
    if layout.recompute is Recompute.full:
        return frozenset({"attention", "core_attn", "mlp", "moe", "shared_experts", "norms"})
    modules = set(layout.recompute_modules)
    return frozenset(modules | {"shared_experts"} if "moe" in modules else modules)


def kept(model: ModelConfig, parts: Parts, shape: Shape, layout: LayoutConfig, *, b: int) -> Parts:
    """What is left of a layer's parts under layout.recompute.

    full keeps the layer's input, b tH. core_attn keeps its inputs: the rotated keys b Sg and what attention
    keeps. mlp, moe and shared_experts keep nothing: their input is the norm's output. layernorm drops the
    norm in front of experts, b tH (the other norms are fused into a linear layer). moe_act keeps the gate
    and up projections, 2b N Fe/etp, beside the experts' inputs.
    """
    if layout.recompute is Recompute.none:
        return parts
    if layout.recompute is Recompute.full:
        return {"residual": b * shape.tokens * model.hidden_size}
    modules = recomputed_modules(layout)
    left = dict(parts)
    if "core_attn" in modules:
        left["core_attn"] = b * shape.rows * model.kv_heads * model.head_dim // layout.tp
    if "experts" in parts:
        if "layernorm" in modules:
            left["norms"] -= b * shape.tokens * model.hidden_size
        if "moe_act" in modules:
            inputs = model.hidden_size + 2 * model.expert_hidden_size // layout.etp
            left["experts"] = b * shape.routed * inputs
    dropped = {"mlp": ("mlp",), "shared_experts": ("shared_experts",), "moe": ("experts", "router")}
    for module in modules:
        for part in dropped.get(module, ()):
            left.pop(part, None)
    return left


def embedding_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """b tH, the first layer's input; with tp > 1 also b SH of unreduced rows and 9S of local ids and map."""
    partial = b * shape.rows * model.hidden_size + 9 * shape.rows if layout.tp > 1 else 0
    return b * shape.tokens * model.hidden_size + partial


def batch_bytes(model: ModelConfig, shape: Shape) -> int:
    """16S tokens and positions, 36n outputs, labels, weights and bins, 8K key order, 4 r rotary_rows angles.

    Every stage builds its micro-batches itself and keeps each until its backward.
    """
    angles = 4 * shape.rotary_rows * int(model.head_dim * model.rotary_fraction)
    return 16 * shape.rows + 36 * shape.supervised + (8 * shape.keys if shape.gathered else 0) + angles


def head_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """What the final norm and the head keep: 4t 1/rms, b nH chosen rows, 4n losses.

    Several chunks are recomputed in backward and keep no logits; a single one keeps fp32 probabilities
    [n, V/tp] and 9n of local labels and their map.
    """
    n = shape.supervised
    single = n * (4 * model.vocab_size // layout.tp + 9) if n <= model.head_chunk_tokens else 0
    return 4 * shape.tokens + b * n * model.hidden_size + 4 * n + single


def head_transient(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """Upper bound of what the head's backward holds at once beyond what is kept.

    A chunk's probabilities (fp32) and their gradient in the weights' type, 4 + b bytes of [c, V/tp]; the
    head's weight gradient b VH/tp, twice when chunks add up; gradients of the chosen rows b nH and of the
    gathered hidden states b SH.
    """
    n, chunk = shape.supervised, min(shape.supervised, model.head_chunk_tokens)
    vocabulary = model.vocab_size // layout.tp
    logits = (4 + b if n > chunk else b) * chunk * vocabulary
    weights = (2 if n > chunk else 1) * b * vocabulary * model.hidden_size
    return logits + weights + b * (n + shape.rows) * model.hidden_size


def layer_transient(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    parts: Parts,
    left: Parts,
    *,
    b: int,
) -> int:
    """Upper bound of what a layer's backward holds at once beyond what is kept.

    The largest of: five token buffers b NH of the experts (permuted, received, their outputs, those
    concatenated, those sorted back; the same in backward); three buffers of a dense MLP's width; gradients of
    queries and output, and of the exchanged keys and values as ordered, pooled and received. Recomputed
    tensors are alive again while their layer runs backward.
    """
    head_dim, tp = model.head_dim, layout.tp
    attention = 2 * b * shape.rows * model.heads * head_dim // tp
    if layout.cp > 1:
        attention += 3 * 2 * b * shape.keys * model.kv_heads * head_dim // tp
    if "experts" in parts:
        mlp = 5 * b * shape.routed * model.hidden_size
    else:
        mlp = b * shape.rows * (3 * model.ffn_hidden_size // tp + model.hidden_size)
    return max(attention, mlp) + sum(parts.values()) - sum(left.values())
