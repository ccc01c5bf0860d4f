"""What is alive for a moment beyond what is kept, at the moments of a step that can be its peak.

Legend as in activations.py. Each building block has a moment in forward and one in backward. What it finds
beside itself is what `activations` counts as kept: in forward everything up to and with the block, in
backward the same. A moment therefore adds what it alone needs. Read off megatron-core 0.19.2 operation by
operation and confirmed by the dry run (docs/planning.md), to within a few scalars for the moments marked =.
"""

from __future__ import annotations

from llada_megatron.config.schema import Dispatcher, LayoutConfig, ModelConfig, Recompute
from llada_megatron.plan.activations import (
    Parts,
    angle_bytes,
    gathered_tokens,
    keeps_angles,
    keeps_marks,
    mark_bytes,
    recomputed_modules,
)
from llada_megatron.plan.shapes import Shape


def during_forward(model: ModelConfig, shape: Shape, layout: LayoutConfig) -> int:
    """Alive all through a forward: 4r rotary_rows angles, what routers know of rows, and the micro-batch
    without its positions."""
    if layout.overlap_experts:
        return 0  # activations.stage_bytes has it
    angles = 0 if keeps_angles(model, layout) else angle_bytes(model, shape)
    marks = 0 if keeps_marks(layout) else mark_bytes(model, shape)
    return angles + marks + 8 * shape.rows + shape.row_bytes.batch * shape.supervised


def experts_forward(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """= When the experts' outputs are laid together: the MoE layer's largest moment, also when recomputed.

    b tH of the shared expert's output; the copies as permuted, sent (bH + 4), and with ep > 1 as received,
    b N/etp H; the outputs one by one and together, 2b NH, or once where a process has one expert. With
    etp > 1 a little later: outputs are in fp32 as well, 4NH, and summed over etp, 4N/etp H.
    """
    if layout.dispatcher is Dispatcher.allgather:
        return _gathered_forward(model, shape, layout, b=b)
    if layout.overlap_experts:
        return _parted_forward(model, shape, layout, b=b)
    hidden, received = model.hidden_size, shape.routed // layout.etp
    several = model.experts // layout.ep > 1
    moment = b * shape.tokens * hidden if model.shared_expert_hidden_size else 0
    if several or layout.ep > 1:
        moment += (b * hidden + 4) * shape.sent
    if layout.ep > 1 and (several or layout.etp > 1):
        moment += b * hidden * received
    if layout.etp > 1:
        moment += 4 * hidden * (shape.routed + received)
    return moment + (2 if several else 1) * b * shape.routed * hidden


def _parted_forward(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """Of a MoE layer's forward in parts (layout.overlap_experts), each of which frees what it was given.

    The copies as received, b N/etp H, and the experts' outputs as in `experts_forward`; or the outputs
    together, b NH, the copies that came back, b sent H, and their sum without and with the shared expert's
    output and the residual, 3b tH.
    """
    received, several = shape.routed // layout.etp, model.experts // layout.ep > 1
    given = (received if several or layout.etp > 1 else 0) + (2 if several else 1) * shape.routed
    fp32 = 4 * (shape.routed + received) if layout.etp > 1 else 0
    back = shape.routed + shape.sent + 3 * shape.tokens
    return max(b * given + fp32, b * back) * model.hidden_size


def experts_travelling(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """Of a MoE layer's backward in parts once its gradients travelled: (bH + 4) a copy, as received and sent.

    And 2b tH of the residual's and the shared expert's output's.
    """
    copies = shape.routed // layout.etp + shape.sent
    return (b * model.hidden_size + 4) * copies + 2 * b * shape.tokens * model.hidden_size


def _gathered_forward(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """Of a MoE layer's forward where the tokens T of all processes are gathered.

    b tH, tE of the map and 4TE of all probabilities, with the larger of the experts' outputs, 2b NH (or
    once), and their sums before and after the exchange, in fp32 as well, (b + 4) TH and 4tH.
    """
    hidden, experts = model.hidden_size, model.experts
    moment = shape.tokens * experts
    moment += b * shape.tokens * hidden if model.shared_expert_hidden_size else 0
    outputs = (2 if experts // layout.ep > 1 else 1) * b * shape.routed * hidden
    if layout.ep * layout.etp == 1:
        return moment + outputs
    tokens = gathered_tokens(shape, layout)
    return moment + 4 * tokens * experts + max(outputs, ((b + 4) * tokens + 4 * shape.tokens) * hidden)


def experts_backward(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, parts: Parts, left: Parts, *, b: int
) -> int:
    """= b tH gradient of the output, and all that is recomputed with the forward's moment.

    The order of the copies is held already (activations.held_bytes). Without recompute backward needs the
    gradient of the copies, as many times as forward needs the copies, once less. Gathered tokens' gradients
    travel as the tokens do.
    """
    gradient = b * shape.tokens * model.hidden_size
    moment = experts_forward(model, shape, layout, b=b)
    gathered = layout.dispatcher is Dispatcher.allgather
    if "moe" not in recomputed_modules(layout):
        return gradient + moment - b * shape.routed * model.hidden_size
    return gradient + moment + _again(parts, left) - (12 * shape.routed if gathered else 8 * shape.sent)


def dense_forward(model: ModelConfig, shape: Shape, *, b: int) -> int:
    """The MLP's output before it is reduced."""
    return b * shape.rows * model.hidden_size


def dense_backward(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, parts: Parts, left: Parts, *, b: int
) -> int:
    """b tH of the output's gradient, whole as well with tp > 1, and at one of two moments:

    = when SwiGLU's gradient is made, b SF/tp and 2b SF/tp of the product's and its inputs', where the product
    itself is gone; when the gradient of its weights is made, 2b HF/tp, with 2b SF/tp of SwiGLU's inputs' and
    b SH of the layer's input's, where all that SwiGLU kept, 3b SF/tp, is gone. A recomputed layer has its
    output as well, b tH.
    """
    product = b * shape.rows * model.ffn_hidden_size // layout.tp
    weights = 2 * b * model.hidden_size * model.ffn_hidden_size // layout.tp
    gradient = b * shape.tokens * model.hidden_size
    whole = b * shape.rows * model.hidden_size
    output = gradient if layout.recompute is Recompute.full else 0
    moment = max(2 * product, weights + whole - product)
    return gradient + (whole if layout.tp > 1 else 0) + moment + output + _again(parts, left)


def attention_backward(
    model: ModelConfig,
    shape: Shape,
    behind: Shape,
    layout: LayoutConfig,
    parts: Parts,
    left: Parts,
    *,
    b: int,
) -> int:
    """Of attention once what lies behind it in its layer, of the rows `behind`, is gone: over what the whole
    layer keeps.

    All that attention keeps is there or made again, with the first residual and norm; gradients of the
    residual and of attention's output, b tH and b S heads/tp Dv; and the most of three: b S heads/tp hd of
    queries' gradients and b K kv_heads/tp (hd + Dv) of keys' and values'; where core_attn runs again under
    context parallelism, its inputs, and beside its ordered copy the exchange's rows, what it received and
    both laid together; where mla_up_proj does, the projections as they come, b S heads/tp (hd +
    qk_nope_head_dim + Dv), and what is rotated of them, b S (heads/tp + 1) Dr.
    """
    S, t, hidden = shape.rows, shape.tokens, model.hidden_size
    modules = layout.recompute_modules if layout.recompute is Recompute.selective else []
    heads, kv_heads = model.heads // layout.tp, model.kv_heads // layout.tp
    key = kv_heads * (model.head_dim + model.value_dim)
    there = parts["attention"] + parts["core_attn"] + parts["norms"] + b * t * hidden
    there -= (b * hidden + 4) * behind.tokens
    own_keys, exchanged = 0, 0
    if layout.cp > 1 and "core_attn" in modules:
        own = S // 2 if shape.halved_rows else 0
        own_keys = b * S * (key if model.mla.is_used else kv_heads * model.head_dim)
        laid_together = own + shape.gathered if own else 0  # own keys and those received
        exchanged = own_keys + b * key * (S + shape.gathered + laid_together)
    gradients = own_keys + b * (S * heads * model.head_dim + shape.keys * key)
    ways_up = 0
    if "mla_up_proj" in modules:
        mla = model.mla
        ways_up = b * S * heads * (model.head_dim + mla.qk_nope_head_dim + mla.v_head_dim)
        ways_up += b * S * (heads + 1) * mla.qk_rope_head_dim
    outputs = b * (t * hidden + S * heads * model.value_dim)
    return there + outputs + max(gradients, exchanged, ways_up) - sum(left.values())


def _again(parts: Parts, left: Parts) -> int:
    """What recompute brings back."""
    return sum(parts.values()) - sum(left.values())


def head_forward(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """= When logits become fp32: b tH of the final norm's output, whole as well with tp > 1; b cV/tp logits.

    With several chunks the fp32 logits are not kept, 4 cV/tp more; a readout may copy them. Labels' map, 9n,
    and metrics come later.
    """
    n, chunk, row = shape.supervised, min(shape.supervised, model.head_chunk_tokens), shape.row_bytes
    hidden = shape.tokens + (shape.rows if layout.tp > 1 else 0)
    wide = (b if n <= model.head_chunk_tokens else b + 4) + 4 * row.forward_copies
    later = row.kept * n + 8 * shape.sums + n * (row.kept_with_logits if n <= model.head_chunk_tokens else 8)
    return b * hidden * model.hidden_size + wide * chunk * model.vocab_size // layout.tp - later


def head_backward(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """A single chunk: weight gradient b VH/tp, and b n(V/tp + H) of logits' and rows', where 4nV/tp are gone;
    before that, a readout may copy the logits.

    Several chunks: b nH of rows' gradients, and the larger of a weight gradient with b cV/tp of logits', and
    the logits in fp32 as well, and their copies. In fp32 the chunks' weight gradients add up in one more; in
    bf16 they do so in the micro-batches' sum (model/head.py).
    """
    n, vocabulary, row = shape.supervised, model.vocab_size // layout.tp, shape.row_bytes
    weight, rows = b * vocabulary * model.hidden_size, b * n * model.hidden_size
    if n <= model.head_chunk_tokens:
        return max(weight + rows + (b - 4) * n * vocabulary, 4 * row.backward_copies * n * vocabulary)
    chunk, wide = model.head_chunk_tokens, 4 + b + 4 * row.forward_copies
    added_up = weight if b == 4 else 0
    return rows + added_up + max(weight + b * chunk * vocabulary, wide * chunk * vocabulary)


def embedding_backward(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> int:
    """The table's gradient, b VH/tp, and the rows', b SH."""
    return b * model.hidden_size * (model.vocab_size // layout.tp + shape.rows)


def clipping(model: ModelConfig, layout: LayoutConfig) -> int:
    """= As gradients are clipped, on the first stage: the table's, scaled in fp32, beside it.

    megatron-core's local_multi_tensor_scale makes that copy; TransformerEngine's kernel makes none.
    """
    return 4 * model.vocab_size // layout.tp * model.hidden_size


def pipeline_buffers(layout: LayoutConfig, rank: int) -> int:
    """= Hidden states [t, H] of neighbours: a received gradient; a sent one, and the input it belongs to.

    Interleaved stages have neighbours on both sides, and receive ahead: one more, an upper bound.
    """
    if layout.vpp > 1:
        return 4
    return (rank < layout.pp - 1) + 2 * (rank > 0)
