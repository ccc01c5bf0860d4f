"""What the family `dlcm` has between encoder and decoder, beside its layers: sizes, bytes, messages.

Counted with a concept every R tokens: how many there are is random, and training brings their mean there.

Legend, per process and micro-batch: T tokens, t = T/tp, B sequences, M concepts, m rows of the backbone
(M and its padding), K keys of the attention to concepts, H and Hc hidden sizes, n and nkv heads / tp,
d head_dim, q = n d and g = nkv d; b bytes of an element. Bytes are those of model/dlcm.py's operations, held
against the dry run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llada_megatron.config.choices import BoundaryGrad, ConceptAttention, ConceptOf
from llada_megatron.config.concepts import CHANNELS, ROWS
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.traffic import Message


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a micro-batch."""

    sequences: int
    concepts: int
    rows: int
    keys: int


def sizes(model: ModelConfig, shape: Shape, layout: LayoutConfig) -> Sizes:
    """B, M, m and K, each sequence being one document."""
    length, multiple = shape.rotary_rows, ROWS * layout.tp
    sequences = shape.rows // length
    concepts = sequences * (int((length - 1) // model.concepts.tokens_per_concept) + 1)
    is_ragged = model.concepts.attention is ConceptAttention.ragged
    return Sizes(
        sequences,
        concepts,
        -(-concepts // multiple) * multiple,
        (concepts if is_ragged else shape.rows) + sequences,
    )


def of_concepts(model: ModelConfig, shape: Shape, layout: LayoutConfig) -> Shape:
    """The micro-batch as the backbone sees it: one row of concepts, padding with them."""
    rows = sizes(model, shape, layout).rows
    tokens = rows // layout.tp
    busiest = shape.routed / (shape.sent * layout.etp) if shape.sent else 1.0
    sent = tokens * model.experts_per_token
    return replace(
        shape,
        rows=rows,
        tokens=tokens,
        sent=sent,
        routed=math.ceil(sent * layout.etp * busiest),
        keys=rows,
        rotary_rows=rows,
        pairs=shape.pairs / model.concepts.tokens_per_concept**2,
        samples=1,
        last_rows=0,
    )


def found_parts(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> dict[str, int]:
    """What waits for backward from the encoder's last norm to the backbone's first layer.

    encoder   b tH and 4t of the norm, b TH of h, whole on every process
    detector  fp32 queries and keys, and both normalised without a row, 16TH - 8H; 16(T - 1) of their norms,
              4T of p; 8 of each document's start
    pooling   b MH means; 8T concepts of tokens and 8M lengths, and 4TH of tokens made fp32, or 8M first
              tokens; with tp > 1 b (m - m/tp) Hc, since a process's part of the projection holds all of it
    """
    T, H, at = shape.rows, model.hidden_size, sizes(model, shape, layout)
    starts = 8 * at.sequences if at.sequences > 1 else 0  # one number is a scalar
    pooled = 8 * T + 4 * T * H * (b < 4) if model.concepts.concept is ConceptOf.mean else 0
    spare = b * (at.rows - at.rows // layout.tp) * model.concepts.hidden_size
    return {
        "encoder": (b * H + 4) * shape.tokens + b * T * H,
        "detector": 16 * T * H - 8 * H + 16 * (T - 1) + 4 * T + starts,
        "pooling": pooled + 8 * at.concepts + b * at.concepts * H + spare,
    }


def told_parts(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> dict[str, int]:
    """What waits for backward from the backbone's last norm to the decoder's first layer.

    backbone   b m/tp Hc and 4m/tp of the norm
    smoothing  b m Hc inputs, whole on every process, 4M weights, 4M Hc results
    attention to concepts
               b K Hc keys' concepts and 8K of their numbers; b Tq and 2b Kg projections; 4(Tn + K nkv) 1/rms;
               4Tn log-sum-exp; normed queries and output 2b Tq and normed keys b Kg; replicated instead
               2b Tn(d + 8) and 2b K nkv(d + 8), and b Tq of the output without the added channels
    decoder    with tp > 1 b (T - t) H: its first layer's part holds all of its input
    """
    T, at, layers = shape.rows, sizes(model, shape, layout), of_concepts(model, shape, layout)
    wide, d, tp = model.concepts.hidden_size, model.head_dim, layout.tp
    n, nkv, M, K = model.heads // tp, model.kv_heads // tp, at.concepts, at.keys
    attended = 2 * b * T * n * d + b * K * nkv * d
    if model.concepts.attention is ConceptAttention.replicated:
        attended = 2 * b * (T * n + K * nkv) * (d + CHANNELS) + b * T * n * d
    projections = b * (T * n + 2 * K * nkv) * d
    straight_through = model.concepts.boundary_grad is BoundaryGrad.ste
    return {
        "backbone": (b * wide + 4) * layers.tokens,
        "smoothing": b * layers.rows * wide + 4 * M + 4 * M * wide + 8 * M * straight_through,
        "concept_attn": (8 + b * wide) * K
        + projections
        + 4 * (2 * T * n + K * nkv)
        + attended
        + straight_through * (b * model.hidden_size + b + 1) * T,
        "decoder": b * (T - shape.tokens) * model.hidden_size,
    }


def found_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> list[Message]:
    """h gathered, since each process finds all boundaries; the parts of the concepts' gradient gathered."""
    if layout.tp == 1:
        return []
    rows = sizes(model, shape, layout).rows
    return [
        Message("tp", "all_gather", b * shape.rows * model.hidden_size, 1, 0),
        Message("tp", "all_gather", b * rows * model.concepts.hidden_size, 0, 1),
    ]


def told_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> list[Message]:
    """Concepts gathered; of the attention to them sums of outputs, of gradients of queries' inputs and keys';
    and the gradient of the decoder's input gathered."""
    if layout.tp == 1:
        return []
    at = sizes(model, shape, layout)
    tokens, wide = b * shape.rows * model.hidden_size, b * model.concepts.hidden_size
    return [
        Message("tp", "all_gather", at.rows * wide, 1, 0),
        Message("tp", "all_reduce", tokens, 1, 1, hidden=1),
        Message("tp", "all_reduce", at.keys * wide, 0, 1, hidden=1),
        Message("tp", "all_gather", tokens, 0, 1),
    ]


PARSER = Message("dp", "all_reduce", 16.0, 1, 0)
"""Once per step: how many tokens of the global batch open a concept, and how many there are, fp64."""
