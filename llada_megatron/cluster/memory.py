"""Bytes on the fullest process of each pipeline rank: what lies there always, and the peak of a step.

peak = weights + gradients + optimizer + micro-batches in flight * what each keeps + transient
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from llada_megatron.cluster import activations
from llada_megatron.cluster.shapes import Shape
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.parameters import Contents, Parameters
from llada_megatron.config.schema import LayoutConfig, ModelConfig

Static = dict[str, int]
"""Bytes of weights, gradients and optimizer."""

NOT_MODELLED = (
    "fragmentation of the allocator, buffers of NCCL, the CUDA context, workspaces of kernels,"
    " the padding of gradient buffers"
)


def static_bytes(held: Parameters, layout: LayoutConfig, *, b: int) -> Static:
    """What a process holds between steps.

    weights    b per element, and 8 per element of expert_bias: fp32 bias and fp32 counts
    gradients  4 per element: fp32 buffers
    optimizer  two fp32 moments per element that this process updates; for bf16 weights also an fp32 master.
               fp32 weights need none: megatron-core's optimizer then updates a view of them. Elements are
               shared out over dp*cp, those of experts over expert dp, rounded up to whole elements.
    """
    per_element = 8 if b == 4 else 12
    mine = -(-held.dense // (data_parallel_size(layout) * layout.cp))
    mine += -(-held.expert // expert_data_parallel_size(layout))
    return {
        "weights": b * held.trained + 8 * held.bias,
        "gradients": 4 * held.trained,
        "optimizer": per_element * mine,
    }


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
    """A layer of one kind, the embedding or the head: bytes kept per micro-batch, and its transient."""

    parts: activations.Parts
    """What is kept, by part of the model."""
    kept: int
    dropped: int
    """What recompute brings back in backward."""
    transient: int


@dataclass(frozen=True, slots=True)
class Units:
    """What stages are made of, for one layout and one kind of micro-batch."""

    dense: Unit
    moe: Unit
    embedding: Unit
    head: Unit
    batch: int

    def kept(self, contents: Contents) -> int:
        """Bytes that one micro-batch keeps in a (virtual) stage."""
        layers = contents.dense * self.dense.kept + contents.moe * self.moe.kept
        ends = contents.first * self.embedding.kept + contents.last * self.head.kept
        return layers + ends + self.batch

    def transient(self, stages: Sequence[Contents]) -> int:
        """The largest transient of anything that these stages hold; backward runs one layer at a time."""
        largest = self.embedding.transient if stages[0].first else 0
        if stages[-1].last:
            largest = max(largest, self.head.transient)
        for stage in stages:
            if stage.dense:
                largest = max(largest, self.dense.transient)
            if stage.moe:
                largest = max(largest, self.moe.transient)
        return largest


def units(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> Units:
    """Bytes of each building block under a layout."""

    def layer(moe: bool) -> Unit:
        parts = activations.layer_parts(model, shape, layout, moe=moe, b=b)
        left = activations.kept(model, parts, shape, layout, b=b)
        transient = activations.layer_transient(model, shape, layout, parts, left, b=b)
        keeps = sum(left.values())
        return Unit(left, keeps, sum(parts.values()) - keeps, transient)

    embedding = activations.embedding_bytes(model, shape, layout, b=b)
    head = activations.head_bytes(model, shape, layout, b=b)
    table_gradient = b * model.vocab_size // layout.tp * model.hidden_size
    return Units(
        dense=layer(False),
        moe=layer(True),
        embedding=Unit({"embedding": embedding}, embedding, 0, table_gradient),
        head=Unit({"head": head}, head, 0, activations.head_transient(model, shape, layout, b=b)),
        batch=activations.batch_bytes(model, shape),
    )


def peak_activations(
    blocks: Units, stages: Sequence[Contents], layout: LayoutConfig, rank: int, micro_batches: int
) -> tuple[int, tuple[int, ...]]:
    """Bytes kept at the peak on a pipeline rank, and the micro-batches in flight per virtual stage."""
    sizes = [blocks.kept(stage) for stage in stages]
    moments = in_flight(layout.pp, rank, layout.vpp, min(micro_batches, 4 * layout.pp * layout.vpp))
    return max(
        (sum(count * size for count, size in zip(counts, sizes, strict=True)), counts) for counts in moments
    )
