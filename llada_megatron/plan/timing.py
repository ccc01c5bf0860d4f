"""Seconds of a training step from those of its blocks: recompute, pipeline, gradients and the optimizer.

A micro-batch on a pipeline rank takes the sum of its operations: nothing but the messages named as hidden in
traffic.py, and what the layout's overlaps ask for, runs beside another. The achievable fractions of the
cluster's description are assumptions until they are fitted to measurements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llada_megatron.config.contents import Contents, Parameters
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan import activations, layer_time, traffic
from llada_megatron.plan.layer_time import Block, Parts
from llada_megatron.plan.memory import Layers
from llada_megatron.plan.peak import forwards_ahead
from llada_megatron.plan.rates import Rates
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.topology import Group


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of each building block for one micro-batch and kind of pass."""

    dense: Block
    moe: Block
    embedding: Block
    head: Block
    """With what the last layer takes less than another, where fewer rows go on in it."""

    @property
    def totals(self) -> tuple[float, float, float, float]:
        """Seconds of a dense layer, a MoE layer, the embedding and the head."""
        return self.dense.total, self.moe.total, self.embedding.total, self.head.total

    def of(self, counts: tuple[int, int, int, int]) -> Parts:
        """Of one micro-batch through so many dense layers, MoE layers, embeddings and heads."""
        result: Parts = defaultdict(float)
        for count, block in zip(counts, (self.dense, self.moe, self.embedding, self.head), strict=True):
            for name, seconds in block.parts.items():
                result[name] += count * seconds
        return result


def counts(stages: Iterable[Contents]) -> tuple[int, int, int, int]:
    """Dense layers, MoE layers, embeddings and heads."""
    stages = list(stages)
    return (
        sum(stage.dense for stage in stages),
        sum(stage.moe for stage in stages),
        sum(stage.first for stage in stages),
        sum(stage.last for stage in stages),
    )


def seconds_of(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    at: Rates,
    links: dict[str, Group],
    blocks: Layers,
    *,
    forward_only: bool = False,
) -> Seconds:
    """Seconds of every building block under a layout, forward and backward or in a pass without gradients."""
    work = layer_time.Work(
        model, shape, layout, at, links, activations.recomputed_modules(layout), forward_only
    )
    return Seconds(
        layer_time.layer(work, blocks.dense, moe=False),
        layer_time.layer(work, blocks.moe, moe=True),
        layer_time.embedding(work, blocks),
        layer_time.head(work, blocks),
    )


def accumulation_seconds(held: Parameters, at: Rates) -> float:
    """Adding a micro-batch's gradients to the buffers, whose numbers are read and written.

    A product of its own also writes b, which are read again; where TransformerEngine adds them, it does not.
    """
    passed = 2 * at.gradient_bytes + (0 if at.fused else 2 * at.b)
    return passed * held.trained / at.memory


def optimizer_seconds(held: Parameters, layout: LayoutConfig, at: Rates) -> float:
    """Clearing the gradients; per element updated here a norm of g, then gradient, weight and moments.

    Of g bytes a gradient and m a moment, the update reads g + 4 + 2m and writes the fp32 weight, both moments
    and the weight itself: 4 + 2m + b.
    """
    g, m = at.gradient_bytes, at.moment_bytes
    mine = held.dense / (data_parallel_size(layout) * layout.cp)
    mine += held.expert / expert_data_parallel_size(layout)
    return (g * held.trained + (g + (g + 4 + 2 * m) + (4 + 2 * m + at.b)) * mine) / at.memory


def message_seconds(messages: Sequence[traffic.Message], links: dict[str, Group]) -> dict[str, float]:
    """Seconds of a step's messages by what they carry: gradients, weights, or (empty) a tied head's sum."""
    seconds = {"gradients": 0.0, "weights": 0.0, "": 0.0}
    for message in messages:
        seconds[message.module] += message.calls(frozenset()) * message.seconds(links)
    return seconds


def gradient_seconds(
    seconds: dict[str, float], layout: LayoutConfig, micro_batch: float, overlap: float
) -> float:
    """What nothing hides of `message_seconds`.

    layout.overlap_grad_reduce hides reductions behind the backward of the last micro-batch (two thirds of
    `micro_batch` seconds), layout.overlap_param_gather hides gathers behind the forward of the first.
    """
    gradients, weights = seconds["gradients"], seconds["weights"]
    if layout.overlap_grad_reduce:
        gradients = max(0.0, gradients - overlap * micro_batch * 2 / 3)
    if layout.overlap_param_gather:
        weights = max(0.0, weights - overlap * micro_batch / 3)
    return gradients + weights + seconds[""]


def pipeline_seconds(
    per_kind: Sequence[float], alike: Sequence[int], micro_batches: int, vpp: int
) -> tuple[float, float]:
    """Seconds of all micro-batches on the slowest rank, and what the ranks wait for each other.

    per_kind: seconds of a micro-batch on a rank of each kind, of which there are `alike`. A pipeline works
    as fast as its slowest rank, m times; filling and draining it takes a micro-batch on every other rank, or
    1/vpp of that where stages are interleaved. With equal ranks the wait is (pp - 1)/(vpp m) of the work.
    """
    slowest = max(per_kind)
    everyone = sum(seconds * ranks for seconds, ranks in zip(per_kind, alike, strict=True))
    return micro_batches * slowest, (everyone - slowest) / vpp


def paired_share(layout: LayoutConfig, rank: int, micro_batches: int) -> float:
    """Share of a rank's micro-batches whose forward runs beside another one's backward (overlap_experts).

    All but those that fill the pipeline before its first backward, and drain it after its last forward.
    """
    if not layout.overlap_experts:
        return 0.0
    ahead = forwards_ahead(layout.pp, rank, layout.vpp, micro_batches, overlapped=True)
    return 1 - ahead / (micro_batches * layout.vpp)
