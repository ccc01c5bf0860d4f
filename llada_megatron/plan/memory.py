"""Bytes on the fullest process of each pipeline rank: what lies there always, and the peak of a step.

peak = weights + gradients + optimizer + micro-batches in flight * what each keeps + transient
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llada_megatron.config.contents import BUFFER_MULTIPLE, Contents, Parameters
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan import activations, transient
from llada_megatron.plan.shapes import Shape

Static = dict[str, int]
"""Bytes of weights, gradients and optimizer."""

NOT_MODELLED = (
    "fragmentation of the allocator, buffers of NCCL, the CUDA context, workspaces of kernels,"
    " the padding between buckets of gradients"
)


def static_bytes(held: Parameters, layout: LayoutConfig, *, b: int, averages: bool = False) -> Static:
    """What a process holds between steps.

    weights    b per element of the buffers, where each has a gradient, and of what adapters stand beside;
               4 per element of expert_bias and per expert of a router, whose tokens it counts: fp32
    gradients  4 per element of the buffers: fp32
    optimizer  two fp32 moments per element that this process updates; for bf16 weights also an fp32 master.
               fp32 weights need none: megatron-core's optimizer then updates a view of them. Buffers are
               shared out over dp*cp, those of experts over expert dp; padding in a share has no state.
               With `averages` (training.ema_decay) another fp32 number.
    """
    per_element = (8 if b == 4 else 12) + (4 if averages else 0)
    dense, expert = padded_buffers(held, layout)
    mine = dense // (data_parallel_size(layout) * layout.cp) + expert // expert_data_parallel_size(layout)
    return {
        "weights": b * (dense + expert + held.frozen) + 4 * (held.bias + held.counts),
        "gradients": 4 * (dense + expert),
        "optimizer": per_element * mine,
    }


def padded_buffers(held: Parameters, layout: LayoutConfig) -> tuple[int, int]:
    """Elements of the gradient buffers of dense parameters and of experts.

    Each is a multiple of BUFFER_MULTIPLE and of the processes that share it. Buckets of
    layout.overlap_grad_reduce, which are padded too, are left out.
    """
    sharing = data_parallel_size(layout) * layout.cp, expert_data_parallel_size(layout)
    multiples = [math.lcm(BUFFER_MULTIPLE, processes) for processes in sharing]
    totals = [0, 0]
    for stage in held.buffers:
        for kind, (size, multiple) in enumerate(zip(stage, multiples, strict=True)):
            totals[kind] += -(-size // multiple) * multiple
    return totals[0], totals[1]


@lru_cache(maxsize=4096)
def in_flight(pp: int, rank: int, vpp: int, micro_batches: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each virtual stage that wait for their backward, at the moments that can be the peak.

    Without interleaving a rank runs pp - rank - 1 forwards ahead, then one forward and one backward by turns:
    min(pp - rank, m). Interleaved (megatron-core's schedules.py, get_pp_rank_microbatches) it runs
    2(pp - rank - 1) + (vpp - 1) pp ahead; forwards take the virtual stages by turns, pp micro-batches of
    each, and backwards take them in reverse. The counts repeat every pp*vpp forwards; of each period the
    largest ones are returned.
    """
    if vpp == 1:
        return ((min(pp - rank, micro_batches),),)
    total = micro_batches * vpp
    ahead = min(2 * (pp - rank - 1) + (vpp - 1) * pp, total)
    live = [0] * vpp
    for index in range(ahead):
        live[index // pp % vpp] += 1
    moments = {tuple(live)}
    for index in range(min(total - ahead, 2 * pp * vpp)):
        live[(ahead + index) // pp % vpp] += 1
        moments.add(tuple(live))
        live[vpp - 1 - index // pp % vpp] -= 1
    largest = [
        one
        for one in moments
        if not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in moments)
    ]
    return tuple(sorted(largest))


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer of one kind, the embedding, the head, or what every stage has: bytes per micro-batch."""

    parts: activations.Parts
    """What is kept, by part of the model."""
    kept: int
    dropped: int = 0
    """What recompute brings back in backward."""
    held: int = 0
    """Of the last micro-batch alone, until the next comes."""
    forward: int = 0
    """Beyond what is kept, at the largest moment of its forward; see transient.py."""
    backward: int = 0


@dataclass(frozen=True, slots=True)
class Units:
    """What stages are made of, for one layout and one kind of micro-batch."""

    dense: Unit
    moe: Unit
    embedding: Unit
    head: Unit
    stage: Unit
    """What every (virtual) stage keeps and holds beside its layers and ends."""
    gathering: int
    """What a process holds for all of them."""
    hidden: int
    """Hidden states between two pipeline stages."""
    statistics: int
    """What the first stage needs at the start of a step, when nothing is kept."""

    def of(self, contents: Contents) -> list[tuple[int, Unit]]:
        """What a (virtual) stage is made of, and how often."""
        return [
            (int(contents.first), self.embedding),
            (contents.dense, self.dense),
            (contents.moe, self.moe),
            (int(contents.last), self.head),
            (1, self.stage),
        ]

    def kept(self, contents: Contents) -> int:
        """Bytes that one micro-batch keeps in a (virtual) stage."""
        return sum(number * unit.kept for number, unit in self.of(contents))

    def held(self, contents: Contents) -> int:
        """Bytes that a (virtual) stage holds of its last micro-batch besides."""
        return sum(number * unit.held for number, unit in self.of(contents))

    def transient(self, stages: Sequence[Contents]) -> int:
        """The largest moment of anything that these stages hold, over what their micro-batches keep.

        Forward passes a stage's blocks in order and backward in reverse: while one runs, those behind it
        keep nothing of this micro-batch yet, or no more.
        """
        largest = 0
        for contents in stages:
            behind = 0
            for number, unit in reversed(self.of(contents)[:-1]):
                if number:
                    largest = max(largest, max(unit.forward + self.stage.forward, unit.backward) - behind)
                    behind += number * unit.kept
        return largest


def units(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> Units:
    """Bytes of each building block under a layout."""
    dense, moe = (activations.layer_parts(model, shape, layout, moe=moe, b=b) for moe in (False, True))
    dense_left, moe_left = (activations.kept(model, parts, shape, layout, b=b) for parts in (dense, moe))
    embedding = activations.embedding_bytes(shape, layout)
    head = activations.head_bytes(model, shape, layout, b=b)
    beside, held = activations.stage_bytes(model, shape, layout)
    return Units(
        dense=Unit(
            parts=dense_left,
            kept=(keeps := sum(dense_left.values())),
            dropped=sum(dense.values()) - keeps,
            forward=transient.dense_forward(model, shape, b=b),
            backward=transient.dense_backward(model, shape, layout, dense, dense_left, b=b),
        ),
        moe=Unit(
            parts=moe_left,
            kept=(keeps := sum(moe_left.values())),
            dropped=sum(moe.values()) - keeps,
            held=activations.held_bytes(model, shape, layout),
            forward=transient.experts_forward(model, shape, layout, b=b),
            backward=transient.experts_backward(model, shape, layout, moe, moe_left, b=b),
        ),
        embedding=Unit(
            parts={"embedding": embedding},
            kept=embedding,
            backward=transient.embedding_backward(model, shape, layout, b=b),
        ),
        head=Unit(
            parts={"head": head},
            kept=head,
            forward=transient.head_forward(model, shape, layout, b=b),
            backward=transient.head_backward(model, shape, layout, b=b),
        ),
        stage=Unit(
            parts={"stage": beside},
            kept=beside,
            held=held,
            forward=transient.during_forward(model, shape, layout),
        ),
        gathering=activations.gather_buffer(model, shape, layout, b=b),
        hidden=b * shape.tokens * model.hidden_size,
        statistics=transient.table_statistics(model, layout, b=b),
    )


def peak_activations(
    blocks: Units, stages: Sequence[Contents], layout: LayoutConfig, rank: int, micro_batches: int
) -> tuple[int, tuple[int, ...]]:
    """Bytes kept and held at a pipeline rank's peak, and micro-batches in flight per virtual stage."""
    sizes = [blocks.kept(stage) for stage in stages]
    held = blocks.gathering + sum(blocks.held(stage) for stage in stages)
    moments = in_flight(layout.pp, rank, layout.vpp, min(micro_batches, 4 * layout.pp * layout.vpp))
    return max(
        (held + sum(count * size for count, size in zip(counts, sizes, strict=True)), counts)
        for counts in moments
    )
