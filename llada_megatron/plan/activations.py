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

from llada_megatron.config.choices import ExpertScore
from llada_megatron.config.schema import Dispatcher, LayoutConfig, ModelConfig, Recompute
from llada_megatron.plan.shapes import Shape

Parts = dict[str, int]
"""Bytes by part of a layer: residual, norms, attention, core_attn, mlp, shared_experts, experts, router."""


def layer_parts(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    *,
    moe: bool,
    b: int,
    behind: Shape | None = None,
) -> Parts:
    """What one layer keeps without recompute; `behind` its attention the last one has fewer rows, t and S.

    residual   2 b tH: the layer's input, and the sum after attention
    norms      2 b tH outputs, 8t 1/rms; with qk_norm 4S (heads + kv_heads)/tp more 1/rms
    attention  b S(q + 2g) projections; b Sq of queries copied out of them where g holds several kv heads;
               b Sq rotated queries; b Sq output; 4b rotary_rows r of cosines and sines for q and k
    core_attn  4S heads/tp log-sum-exp; keys and values: b Sg rotated keys (values are a view of the
               projections), or with context parallelism 2b Kg, the exchange's ordered copy
    mlp        b S F/tp (2 gate and up, 1 product): SwiGLU is fused (bias_activation_fusion)
    experts    b NH inputs; b N Fe/etp (2 gate and up, 1 weighted product)
    router     t `router_bytes`; t(8E + 8k) of sorted indices and remaining ones; 4N received probabilities
               (and see held_bytes). With gathered tokens T (layout.dispatcher=allgather) instead of sorted
               ones 8N order of the copies; 4N probabilities, chosen by 5T E/ep of scores and map
    """
    S, t, tp, behind = shape.rows, shape.tokens, layout.tp, behind or shape
    hidden, head_dim = model.hidden_size, model.head_dim
    q, g = model.heads * head_dim // tp, model.kv_heads * head_dim // tp
    norm_rows = S * (model.heads + model.kv_heads) // tp if model.qk_norm else 0
    copied_queries = b * S * q if model.qk_norm and model.kv_heads // tp > 1 else 0
    rotary = 4 * b * shape.rotary_rows * int(head_dim * model.rotary_fraction)
    parts = {
        "residual": b * (t + behind.tokens) * hidden,
        "norms": (b * hidden + 4) * (t + behind.tokens) + 4 * norm_rows,
        "attention": b * S * (q + 2 * g) + copied_queries + 2 * b * S * q + rotary,
        "core_attn": 4 * S * model.heads // tp + (2 * b * shape.keys * g if layout.cp > 1 else b * S * g),
    }
    S, t, N = behind.rows, behind.tokens, behind.routed
    if not moe:
        parts["mlp"] = 3 * b * S * model.ffn_hidden_size // tp
        return parts
    k = model.experts_per_token
    parts["shared_experts"] = 3 * b * S * model.shared_expert_hidden_size // tp
    parts["experts"] = b * N * (hidden + 3 * model.expert_hidden_size // layout.etp)
    if layout.dispatcher is Dispatcher.allgather:
        chosen_from = gathered_tokens(behind, layout) * model.experts // layout.ep
        parts["router"] = t * router_bytes(model) + 12 * N + 5 * chosen_from
    else:
        parts["router"] = t * (router_bytes(model) + 8 * model.experts + 8 * k) + 4 * N
    return parts


def router_bytes(model: ModelConfig) -> int:
    """Of a token's choice of experts: 4E scores, 8k indices, 4k of the chosen ones' and 4 of their sum.

    A softmax over the chosen alone keeps its k results instead of scores and sum, one over all only the E.
    Where experts are chosen by their scores themselves, without a bias, E tell which groups are closed.
    """
    E, k = model.experts, model.experts_per_token
    if model.expert_score is ExpertScore.softmax:
        return 12 * k if model.normalize_expert_weights else 4 * E + 8 * k
    closed = E if model.expert_groups > 1 and not model.expert_bias else 0
    return 4 * E + 12 * k + 4 + closed


def gathered_tokens(shape: Shape, layout: LayoutConfig) -> int:
    """T = t ep etp: tokens that layout.dispatcher=allgather brings to every process."""
    return shape.tokens * layout.ep * layout.etp


def recomputed_modules(layout: LayoutConfig) -> frozenset[str]:
    """Modules whose forward runs again in backward, in the words of layout.recompute_modules."""
    if layout.recompute is Recompute.none:
        return frozenset()
    if layout.recompute is Recompute.full:
        return frozenset({"attention", "core_attn", "mlp", "moe", "shared_experts", "norms"})
    modules = set(layout.recompute_modules)
    return frozenset(modules | {"shared_experts"} if "moe" in modules else modules)


def kept(
    model: ModelConfig,
    parts: Parts,
    shape: Shape,
    layout: LayoutConfig,
    *,
    b: int,
    behind: Shape | None = None,
) -> Parts:
    """What is left of a layer's parts under layout.recompute; `behind` as in `layer_parts`.

    full keeps the layer's input, b tH. core_attn keeps its inputs: the rotated keys b Sg and what attention
    keeps. mlp, moe and shared_experts keep nothing: their input is the norm's output. layernorm drops the
    norm in front of experts, b tH (the other norms are fused into a linear layer). moe_act keeps the gate
    and up projections, 2b N Fe/etp, beside the experts' inputs.
    """
    if layout.recompute is Recompute.none:
        return parts
    if layout.recompute is Recompute.full:
        return {"residual": b * shape.tokens * model.hidden_size}
    modules, behind = recomputed_modules(layout), behind or shape
    left = dict(parts)
    if "core_attn" in modules:
        left["core_attn"] = b * shape.rows * model.kv_heads * model.head_dim // layout.tp
    if "experts" in parts:
        if "layernorm" in modules:
            left["norms"] -= b * behind.tokens * model.hidden_size
        if "moe_act" in modules:
            inputs = model.hidden_size + 2 * model.expert_hidden_size // layout.etp
            left["experts"] = b * behind.routed * inputs
    dropped = {"mlp": ("mlp",), "shared_experts": ("shared_experts",), "moe": ("experts", "router")}
    for module in modules:
        for part in dropped.get(module, ()):
            left.pop(part, None)
    return left


def held_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig) -> int:
    """What a MoE layer holds of the last micro-batch only, until the next comes.

    5tE: its dispatcher's scattered probabilities (fp32) and map; where the layer is recomputed, 8 per sent
    copy as well, the order of the copies, which backward keeps otherwise. Gathered tokens: T E/ep of the map,
    and likewise 12N of order and probabilities.
    """
    recomputed = "moe" in recomputed_modules(layout)
    if layout.dispatcher is Dispatcher.allgather:
        mapped = gathered_tokens(shape, layout) * model.experts // layout.ep
        return mapped + (12 * shape.routed if recomputed else 0)
    return 5 * shape.tokens * model.experts + (8 * shape.sent if recomputed else 0)


def stage_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig) -> int:
    """What each (virtual) stage keeps of a micro-batch beside its layers.

    8K order of the exchanged keys, 8 per noisy row sent; with full recompute 4r rotary_rows angles,
    which every layer takes; where a layer with experts that choose from pools runs again, the marks of its
    rows, t (1 + w) (model/pools.py).
    """
    angles = 4 * shape.rotary_rows * int(model.head_dim * model.rotary_fraction)
    kept_here = 8 * (shape.keys + shape.halo) if layout.cp > 1 else 0
    if layout.recompute is Recompute.full:
        kept_here += angles
    if model.expert_capacity and "moe" in recomputed_modules(layout):
        kept_here += shape.tokens * (1 + shape.block_bits)
    return kept_here


def embedding_bytes(shape: Shape, layout: LayoutConfig) -> int:
    """8S tokens; with tp > 1 instead 9S of local ids and their map. The rows are the first layer's input."""
    return (9 if layout.tp > 1 else 8) * shape.rows


def gather_buffer(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """b SH with tp > 1: where linear layers gather their inputs, one for the whole process.

    megatron-core's layers.py takes it from get_global_memory_buffer() and never gives it back. Tokens that
    experts gather go through the same one, b TH.
    """
    rows = shape.rows if layout.tp > 1 else 0
    if model.has_experts and layout.dispatcher is Dispatcher.allgather and layout.ep * layout.etp > 1:
        rows = max(rows, gathered_tokens(shape, layout))
    return b * rows * model.hidden_size


def head_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """What the final norm, the head and the loss keep.

    b tH the last layer's output, 4t 1/rms, b nH chosen rows, 12n their places and weights (or what else the
    objective's RowBytes say), the objective's sums in fp64.
    Several chunks are recomputed in backward and keep 8n of labels but no logits; a single one keeps fp32
    (log-)probabilities [n, V/tp] and 9n of local labels and their map.
    """
    n, row = shape.supervised, shape.row_bytes
    logits = 4 * model.vocab_size // layout.tp + row.kept_with_logits
    chunk = n * (logits if n <= model.head_chunk_tokens else 8)
    hidden = b * (shape.tokens + n) * model.hidden_size
    return hidden + 4 * shape.tokens + row.kept * n + 8 * shape.sums + chunk
