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
from llada_megatron.plan import latents
from llada_megatron.plan.shapes import Shape

Parts = dict[str, int]
"""Bytes by part of a layer: residual, norms, attention, core_attn, mlp, shared_experts, experts, router; and
what lies between them."""


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
    (with model.mla attention, core_attn and the norms inside are those of latents.py)
    core_attn  4S heads/tp log-sum-exp; keys and values: b Sg rotated keys (values are a view of the
               projections), or with context parallelism 2b Kg, the exchange's ordered copy
    mlp        b S F/tp (2 gate and up, 1 product): SwiGLU is fused (bias_activation_fusion); likewise the
               shared expert, whose gathered input stays too, b SH, with layout.overlap_shared_experts and tp
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
    rotary = 4 * b * shape.rotary_rows * model.rotated_channels
    parts = {
        "residual": b * (t + behind.tokens) * hidden,
        "norms": (b * hidden + 4) * (t + behind.tokens) + 4 * norm_rows,
        "attention": b * S * (q + 2 * g) + copied_queries + 2 * b * S * q + rotary,
        "core_attn": 4 * S * model.heads // tp + (2 * b * shape.keys * g if layout.cp > 1 else b * S * g),
    }
    if model.mla.is_used:  # behind is shape
        own = latents.attention_parts(model, shape, layout, b=b)
        parts |= own | {"norms": 2 * b * t * hidden + 8 * t + own["norms"]}
    S, t, N = behind.rows, behind.tokens, behind.routed
    if not moe:
        parts["mlp"] = 3 * b * S * model.ffn_hidden_size // tp
        return parts
    k = model.experts_per_token
    parts["shared_experts"] = 3 * b * S * model.shared_expert_hidden_size // tp
    if layout.overlap_shared_experts and tp > 1:
        parts["shared_experts"] += b * S * hidden
    parts["experts"] = b * N * (hidden + 3 * model.expert_hidden_size // layout.etp)
    if layout.dispatcher is Dispatcher.allgather:
        chosen_from = gathered_tokens(behind, layout) * model.experts // layout.ep
        parts["router"] = t * router_bytes(model) + 12 * N + 5 * chosen_from
    else:
        parts["router"] = t * (router_bytes(model) + 8 * model.experts + 8 * k) + 4 * N
    if layout.overlap_experts:
        parts["between"] = between_parts(model, shape, layout, b=b)
    return parts


def between_parts(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """What a MoE layer that runs in parts (layout.overlap_experts) keeps between them besides.

    b tH of the shared expert's output. As received, 4N/etp probabilities where a process has several
    experts, and sorts them; b N/etp H of the copies where it has one, and gathers them over etp.
    """
    received = shape.routed // layout.etp
    shared = b * shape.tokens * model.hidden_size if model.shared_expert_hidden_size else 0
    if model.experts // layout.ep > 1:
        return shared + 4 * received
    return shared + (received * (4 + b * model.hidden_size) if layout.etp > 1 else 0)


def router_bytes(model: ModelConfig) -> int:
    """Of a token's choice of experts: 4E scores, 8k indices, 4k of the chosen ones' and 4 of their sum.

    A softmax over the chosen alone keeps its k results instead of scores and sum, one over all only the E.
    Where experts are chosen by their scores themselves, without a bias, E tell which groups are closed.
    """
    E, k = model.experts, model.experts_per_token
    closed = E if model.expert_groups > 1 and not model.expert_bias else 0
    if model.expert_score is ExpertScore.softmax:
        return 12 * k if model.normalize_expert_weights else 4 * E + 8 * k + closed
    return 4 * E + 12 * k + 4 + closed


def gathered_tokens(shape: Shape, layout: LayoutConfig) -> int:
    """T = t ep etp: tokens that layout.dispatcher=allgather brings to every process."""
    return shape.tokens * layout.ep * layout.etp


def recomputed_modules(layout: LayoutConfig) -> frozenset[str]:
    """Modules whose forward runs again in backward, in the words of layout.recompute_modules."""
    if layout.recompute is Recompute.none:
        return frozenset()
    if layout.recompute is Recompute.full:
        return frozenset({"attention", "core_attn", "mla_up_proj", "mlp", "moe", "shared_experts", "norms"})
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
    norm in front of experts, b tH, and of latent attention likewise (the other norms are fused into a linear
    layer). moe_act keeps the gate and up projections, 2b N Fe/etp, beside the experts' inputs. mla_up_proj
    drops what latents.py says; with core_attn, which keeps the same, it is dropped once.
    """
    if layout.recompute is Recompute.none:
        return parts
    if layout.recompute is Recompute.full:
        return {"residual": b * shape.tokens * model.hidden_size}
    modules, behind = recomputed_modules(layout), behind or shape
    left = dict(parts)
    if "core_attn" in modules:
        own_keys = b * shape.rows * model.kv_heads * model.head_dim // layout.tp
        if model.mla.is_used:
            own_keys += b * shape.rows * model.heads * model.value_dim // layout.tp
        left["core_attn"] = own_keys
    if "mla_up_proj" in modules:
        attention, core = latents.recomputed_heads(model, shape, layout, b=b)
        left["attention"] -= attention
        left["core_attn"] = 0 if "core_attn" in modules else left["core_attn"] - core
    if "layernorm" in modules and model.mla.is_used:
        left["norms"] -= b * shape.tokens * model.hidden_size
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


def keeps_angles(model: ModelConfig, layout: LayoutConfig) -> bool:
    """Whether rotary angles wait for backward: where every layer takes them again, or the ways up or the core
    of latent attention, beside whose keys they are handed in."""
    latent = {"core_attn", "mla_up_proj"} if model.mla.is_used else set()
    return layout.recompute is Recompute.full or not latent.isdisjoint(recomputed_modules(layout))


def keeps_marks(layout: LayoutConfig) -> bool:
    """Whether what routers know of rows waits for backward: where a layer with experts runs again."""
    return "moe" in recomputed_modules(layout)


def stage_bytes(model: ModelConfig, shape: Shape, layout: LayoutConfig) -> int:
    """What each (virtual) stage keeps of a micro-batch beside its layers.

    8K order of the exchanged keys, 8 per noisy row sent; with `keeps_angles` 4r rotary_rows angles; with
    `keeps_marks` those of rows. With layout.overlap_experts its plan holds the angles and the whole
    micro-batch.
    """
    kept_here = 8 * (shape.keys + shape.halo) if layout.cp > 1 else 0
    if keeps_angles(model, layout) or layout.overlap_experts:
        kept_here += angle_bytes(model, shape)
    if layout.overlap_experts:
        kept_here += micro_batch_bytes(shape)
    if keeps_marks(layout):
        kept_here += mark_bytes(model, shape)
    return kept_here


def angle_bytes(model: ModelConfig, shape: Shape) -> int:
    """4r rotary_rows."""
    return 4 * shape.rotary_rows * model.rotated_channels


def mark_bytes(model: ModelConfig, shape: Shape) -> int:
    """What routers know of rows: t (1 + w) where experts are chosen from pools (model/pools.py), or one
    sequence's S where the balance leaves the clean half out (other sequences, and t, are views of it)."""
    if model.expert_capacity:
        return shape.tokens * (1 + shape.block_bits)
    return 0 if model.expert_balance_clean_half else shape.halved_rows


def micro_batch_bytes(shape: Shape) -> int:
    """8S tokens, 8 rotary_rows positions, and what the objective's RowBytes say of n supervised rows."""
    return 8 * (shape.rows + shape.rotary_rows) + shape.row_bytes.batch * shape.supervised


def embedding_bytes(shape: Shape, layout: LayoutConfig) -> int:
    """8S tokens; with tp > 1 instead 9S of local ids and their map. The rows are the first layer's input.

    With layout.overlap_experts the tokens are the micro-batch's (stage_bytes).
    """
    if layout.tp > 1:
        return 9 * shape.rows
    return 0 if layout.overlap_experts else 8 * shape.rows


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
    (log-)probabilities [n, V/tp] and 9n of local labels and their map. With layout.overlap_experts places,
    weights and labels are the micro-batch's (stage_bytes), and what the head returns stays.
    """
    n, row = shape.supervised, shape.row_bytes
    logits = 4 * model.vocab_size // layout.tp + row.kept_with_logits
    labels, kept_row = (0, row.kept_beside_batch) if layout.overlap_experts else (8, row.kept)
    chunk = n * (logits if n <= model.head_chunk_tokens else labels)
    hidden = b * (shape.tokens + n) * model.hidden_size
    return hidden + 4 * shape.tokens + kept_row * n + 8 * shape.sums + chunk
