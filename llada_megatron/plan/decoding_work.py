"""What one forward of decoding computes, reads and sends on a rank, counted for the `gpt` family.

Legend, per rank and forward (shapes.py): S rows, t = S/tp tokens, N routed copies, n rows that the head is
applied to; b bytes of an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llada_megatron.config.families.gpt import active_weights, expert_weights
from llada_megatron.config.families.gpt_attention import decoding_pair_flops, kept_numbers
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan import traffic
from llada_megatron.plan.layer_time import KEPT_FORWARD
from llada_megatron.plan.memory import units
from llada_megatron.plan.rates import Rates
from llada_megatron.plan.shapes import Shape

GATHERED_PASSES = 3
"""Keys and values of several sequences are read, written side by side, and read by attention."""
LOGITS_PASSES = 11
"""In fp32 by the readout `proposal` (model/readout.py): 1 writes them, 2 hide the mask, 1 finds the largest,
2 each subtract, clamp and exponentiate, 1 sums."""


@dataclass(frozen=True, slots=True)
class Work:
    """One kind of operation, in all layers."""

    flops: float
    rate: float
    """FLOP/s that such operations achieve."""
    bytes: float

    def seconds(self, memory: float) -> float:
        """The longer of computing and of moving the bytes at `memory` bytes per second."""
        return max(self.flops / self.rate, self.bytes / memory)

    def is_compute_bound(self, memory: float) -> bool:
        """Whether computing takes longer."""
        return self.flops / self.rate > self.bytes / memory


@dataclass(frozen=True, slots=True)
class Active:
    """The active blocks that a rank reads in a forward."""

    block_size: int
    versions: int
    """Of sequences: each branch of each sequence is one, which reads the keys of the whole context."""
    context: int
    """Tokens that each of them sees."""


def expected_touched(experts: float, per_row: float, rows: float) -> float:
    """Different experts that `rows` rows choose, each `per_row` of `experts` evenly and by itself.

    E (1 - (1 - k/E)^rows): an expert is left out by a row with probability 1 - k/E.
    """
    return experts * (1 - (1 - per_row / experts) ** rows)


def touched_here(model: ModelConfig, shape: Shape, layout: LayoutConfig, block_size: int) -> float:
    """Experts of a rank that the rows of its expert-parallel group are expected to choose.

    With pools (model.expert_capacity) the rows of a block choose among as many experts, and blocks differ.
    """
    rows: float = shape.tokens * layout.ep * layout.etp
    per_row: float = model.experts_per_token
    if model.expert_capacity:
        in_block = min(rows, block_size)
        per_row, rows = expected_touched(model.expert_capacity, per_row, in_block), rows / in_block
    return expected_touched(model.experts, per_row, rows) / layout.ep


def decoding_work(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, active: Active, at: Rates
) -> dict[str, Work]:
    """Operations of a forward on one rank, by name.

    Products read each weight once, the head once per chunk of rows; experts only those that are chosen.
    Hidden states are written and read once, as in training's forward passes.
    """
    S, n, tp, b, H = shape.rows, shape.supervised, layout.tp, at.b, model.hidden_size
    weights = {name: size / tp for name, size in active_weights(model).items()}
    moe = model.layers - min(model.dense_layers, model.layers)

    def products(rows: float, weights: float, rate: float = at.gemm, times: float = 1) -> Work:
        return Work(2 * rows * weights, rate, b * weights * times)

    keys = kept_numbers(model, tp) * b * active.versions * active.context
    head = model.vocab_size / tp * H
    unit = units(model, shape, layout, b=b)
    states = (model.layers - moe) * unit.dense.kept + moe * unit.moe.kept + unit.embedding.kept
    work = {
        "attention's products": products(S, weights["attention"] + weights.get("mla_up_proj", 0)),
        "attention": Work(
            decoding_pair_flops(model) / tp * shape.pairs,
            at.attention,
            keys * (GATHERED_PASSES if active.versions > 1 else 1),
        ),
        "dense layers": products(S, weights["mlp"]),
        "shared experts": products(S, weights["shared_experts"]),
        "head": products(n, head, times=-(-n // model.head_chunk_tokens)),
        "logits": Work(0.0, at.gemm, (2 * b + 4 * LOGITS_PASSES) * n * model.vocab_size / tp),
        "hidden states": Work(0.0, at.gemm, KEPT_FORWARD * states),
    }
    if moe:
        one = moe * expert_weights(model) / layout.etp
        touched = touched_here(model, shape, layout, active.block_size)
        work["routers"] = products(shape.tokens, moe * model.experts * H)
        work["experts"] = Work(2 * shape.routed * one, at.grouped_gemm, b * touched * one)
    return {name: each for name, each in work.items() if each.flops or each.bytes}


def decoding_messages(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int
) -> Iterator[tuple[int, traffic.Message]]:
    """Messages of a forward through the model, and how often it sends them: training's, without backward."""
    dense = min(model.dense_layers, model.layers)
    for times, messages in (
        (dense, traffic.layer_messages(model, shape, layout, moe=False, b=b)),
        (model.layers - dense, traffic.layer_messages(model, shape, layout, moe=True, b=b)),
        (1, traffic.embedding_messages(model, shape, layout, b=b)),
        (1, traffic.head_messages(model, shape, layout, b=b)),
    ):
        for message in messages:
            if message.forward:
                yield times * message.forward, message
