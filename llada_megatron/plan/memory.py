"""Bytes on the fullest process of each pipeline rank: what lies there always, and what building blocks need.

peak = weights + gradients + optimizer + micro-batches in flight * what each keeps + transient (peak.py)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

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
    attention: int = 0
    """Of its backward once what lies behind attention is gone, over what is kept of all the layer."""
    travelling: int = 0
    """With layout.overlap_experts: of its backward, while another micro-batch's experts compute."""

    def most(self, during_forward: int) -> int:
        """Of its moments the largest."""
        return max(self.forward + during_forward, self.backward, self.attention)

    @property
    def inside(self) -> int:
        """Of what a layer keeps that of its experts or its dense MLP."""
        return self.parts.get("experts", self.parts.get("mlp", 0))

    @property
    def dropped(self) -> int:
        """What recompute brings back in backward."""
        return sum(self.whole.values()) - self.kept - self.host if self.whole else 0


@dataclass(frozen=True, slots=True)
class Units(ABC):
    """What stages are made of, for one layout and one kind of micro-batch."""

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

    @abstractmethod
    def of(self, contents: Contents) -> list[tuple[int, Unit]]:
        """What a (virtual) stage is made of, and how often, in the order of forward; last `stage`."""

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
                    largest = max(largest, unit.most(self.stage.forward) - behind)
                    behind += number * unit.kept
        return largest


@dataclass(frozen=True, slots=True)
class Layers(Units):
    """Stages of layers of two kinds between an embedding and a head."""

    dense: Unit
    moe: Unit
    normed: Unit
    """The final norm's output, where the last layer's parts hold it (layout.overlap_experts)."""
    last: Unit | None = None
    """The model's last layer, where fewer rows go on behind its attention; None: it is like the others."""

    def of(self, contents: Contents) -> list[tuple[int, Unit]]:
        """What a (virtual) stage is made of, and how often."""
        dense, moe = contents.before_last if self.last else (contents.dense, contents.moe)
        return [
            (int(contents.first), self.embedding),
            (dense, self.dense),
            (moe, self.moe),
            *([(contents.last_layers, self.last)] if self.last else []),
            (int(contents.last and contents.moe > 0), self.normed),
            (int(contents.last), self.head),
            (1, self.stage),
        ]


def units(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> Layers:
    """Bytes of each building block under a layout.

    Of what goes to the host two layers' are on the device: one leaves, one comes back.
    """
    dense, moe = (layer(model, shape, shape, layout, moe=moe, b=b) for moe in (False, True))
    behind = shape.behind_last
    embedding = activations.embedding_bytes(shape, layout)
    head = activations.head_bytes(model, behind, layout, b=b)
    beside = activations.stage_bytes(model, shape, layout)
    hidden = b * shape.tokens * model.hidden_size
    normed = hidden if layout.overlap_experts else 0
    return Layers(
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
        normed=Unit(parts={"head": normed}, kept=normed),
        stage=Unit(
            parts={"stage": beside},
            kept=beside,
            held=2 * max(dense.host, moe.host),
            forward=transient.during_forward(model, shape, layout),
        ),
        gathering=activations.gather_buffer(model, shape, layout, b=b),
        hidden=hidden,
        clipping=transient.clipping(model, layout),
        last=None if behind is shape else layer(model, shape, behind, layout, moe=model.has_experts, b=b),
    )


def layer(
    model: ModelConfig, shape: Shape, behind: Shape, layout: LayoutConfig, *, moe: bool, b: int
) -> Unit:
    """A layer of one kind; `behind`: the rows that go on behind its attention."""
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
        attention=transient.attention_backward(model, shape, *given[1:], b=b),
        travelling=(
            transient.experts_travelling(model, shape, layout, b=b)
            if moe
            else b * shape.tokens * model.hidden_size
        ),
    )
