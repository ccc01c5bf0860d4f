"""Bytes on the fullest process of each pipeline rank: what lies there always, and the peak of a step.

peak = weights + gradients + optimizer + micro-batches in flight * what each keeps + transient
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from llada_megatron.config.contents import BUFFER_MULTIPLE, Contents, Parameters
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan import activations, transient
from llada_megatron.plan.offload import offloaded
from llada_megatron.plan.shapes import Shape

Static = dict[str, int]
"""Bytes of weights, gradients and optimizer."""

NOT_MODELLED = (
    "fragmentation of the allocator, buffers of NCCL, the CUDA context, workspaces of kernels,"
    " the padding between buckets of gradients"
)


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes per number of what a process holds between steps."""

    b: int
    """Of a weight."""
    gradient: int = 4
    moment: int = 4
    averages: bool = False
    """Whether it keeps an fp32 average of each weight (training.ema_decay)."""
    fp8: bool = False


def static_bytes(held: Parameters, layout: LayoutConfig, at: Kept, *, tables: int = 0) -> Static:
    """What a process holds between steps.

    weights    b per element of the buffers, where each has a gradient, and of what adapters stand beside;
               4 per element of expert_bias and per expert of a router, whose tokens it counts: fp32; with FP8
               a copy by rows and one by columns of what products of layers read, all but `tables` (elements
               of embedding and head)
    gradients  4 per element of the buffers, 2 in bf16
    optimizer  two moments per element that this process updates; for bf16 weights also an fp32 master.
               fp32 weights need none: megatron-core's optimizer then updates a view of them. Buffers are
               shared out over dp*cp, those of experts over expert dp; padding in a share has no state.
               With averages another fp32 number.
    """
    per_element = 2 * at.moment + (0 if at.b == 4 else 4) + (4 if at.averages else 0)
    dense, expert = padded_buffers(held, layout)
    mine = dense // (data_parallel_size(layout) * layout.cp) + expert // expert_data_parallel_size(layout)
    copies = 2 * (held.sharded + held.expert - tables) if at.fp8 else 0
    return {
        "weights": at.b * (dense + expert + held.frozen) + 4 * (held.bias + held.counts) + copies,
        "gradients": at.gradient * (dense + expert),
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
def in_flight(
    pp: int, rank: int, vpp: int, micro_batches: int, overlapped: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each virtual stage that wait for their backward, at the moments that can be the peak.

    Without interleaving a rank runs pp - rank - 1 forwards ahead, then one forward and one backward by turns:
    min(pp - rank, m). Interleaved (megatron-core's schedules.py, get_pp_rank_microbatches) it runs
    2(pp - rank - 1) + (vpp - 1) pp ahead; forwards take the virtual stages by turns, pp micro-batches of
    each, and backwards take them in reverse. The counts repeat every pp*vpp forwards; of each period the
    largest ones are returned. With `overlapped` experts one more runs ahead, beside whose next one the oldest
    runs its backward (an upper bound: it lets go while the other grows).
    """
    if vpp == 1:
        return ((min(pp - rank + overlapped, micro_batches),),)
    total = micro_batches * vpp
    ahead = forwards_ahead(pp, rank, vpp, micro_batches, overlapped)
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


def forwards_ahead(pp: int, rank: int, vpp: int, micro_batches: int, overlapped: bool) -> int:
    """Forwards of virtual stages that a rank runs before its first backward."""
    ahead = 2 * (pp - rank - 1) + (vpp - 1) * pp if vpp > 1 else pp - rank - 1
    return min(ahead + overlapped, micro_batches * vpp)


@dataclass(frozen=True, slots=True)
class Unit:
    """A layer of one kind, the embedding, the head, or what every stage has: bytes per micro-batch."""

    parts: activations.Parts
    """What is kept, by part of the model."""
    kept: int
    whole: activations.Parts = field(default_factory=dict)
    """What would be kept without recompute and offloading, by part."""
    host: int = 0
    """What lies in host memory (layout.offload_modules)."""
    held: int = 0
    """Of the last micro-batch alone, until the next comes."""
    forward: int = 0
    """Beyond what is kept, at the largest moment of its forward; see transient.py."""
    backward: int = 0

    @property
    def dropped(self) -> int:
        """What recompute brings back in backward."""
        return sum(self.whole.values()) - self.kept - self.host if self.whole else 0


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
    clipping: int
    """What the first stage needs once a step's passes are over, when nothing is kept."""
    last: Unit | None = None
    """The model's last layer, where fewer rows go on behind its attention; None: it is like the others."""

    def of(self, contents: Contents) -> list[tuple[int, Unit]]:
        """What a (virtual) stage is made of, and how often."""
        dense, moe = contents.before_last if self.last else (contents.dense, contents.moe)
        return [
            (int(contents.first), self.embedding),
            (dense, self.dense),
            (moe, self.moe),
            *([(int(contents.last), self.last)] if self.last else []),
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
    """Bytes of each building block under a layout.

    Of what goes to the host two layers' are on the device: one leaves, one comes back.
    """
    dense, moe = (_layer(model, shape, shape, layout, moe=moe, b=b) for moe in (False, True))
    behind = shape.behind_last
    embedding = activations.embedding_bytes(shape, layout)
    head = activations.head_bytes(model, behind, layout, b=b)
    beside = activations.stage_bytes(model, shape, layout)
    return Units(
        dense=dense,
        moe=moe,
        embedding=Unit(
            parts={"embedding": embedding},
            kept=embedding,
            backward=transient.embedding_backward(model, shape, layout, b=b),
        ),
        head=Unit(
            parts={"head": head},
            kept=head,
            forward=transient.head_forward(model, behind, layout, b=b),
            backward=transient.head_backward(model, behind, layout, b=b),
        ),
        stage=Unit(
            parts={"stage": beside},
            kept=beside,
            held=2 * max(dense.host, moe.host),
            forward=transient.during_forward(model, shape, layout),
        ),
        gathering=activations.gather_buffer(model, shape, layout, b=b),
        hidden=b * shape.tokens * model.hidden_size,
        clipping=transient.clipping(model, layout),
        last=None if behind is shape else _layer(model, shape, behind, layout, moe=model.has_experts, b=b),
    )


def _layer(
    model: ModelConfig, shape: Shape, behind: Shape, layout: LayoutConfig, *, moe: bool, b: int
) -> Unit:
    """`behind`: the rows that go on behind its attention."""
    whole = activations.layer_parts(model, shape, layout, moe=moe, b=b, behind=behind)
    left = activations.kept(model, whole, shape, layout, b=b, behind=behind)
    host = offloaded(model, left, shape, layout, b=b)
    here = {part: size - host.get(part, 0) for part, size in left.items()}
    given = model, behind, layout, whole, left
    return Unit(
        parts=here,
        kept=sum(here.values()),
        whole=whole,
        host=sum(host.values()),
        held=activations.held_bytes(model, behind, layout) if moe else 0,
        forward=(
            transient.experts_forward(model, behind, layout, b=b)
            if moe
            else transient.dense_forward(model, behind, b=b)
        ),
        backward=(transient.experts_backward if moe else transient.dense_backward)(*given, b=b),
    )


def peak_activations(
    blocks: Units, stages: Sequence[Contents], layout: LayoutConfig, rank: int, micro_batches: int
) -> tuple[int, tuple[int, ...]]:
    """Bytes kept and held at a pipeline rank's peak, and micro-batches in flight per virtual stage."""
    sizes = [blocks.kept(stage) for stage in stages]
    held = blocks.gathering + sum(blocks.held(stage) for stage in stages)
    enough = min(micro_batches, 4 * layout.pp * layout.vpp)
    moments = in_flight(layout.pp, rank, layout.vpp, enough, layout.overlap_experts)
    return max(
        (held + sum(count * size for count, size in zip(counts, sizes, strict=True)), counts)
        for counts in moments
    )
