"""Seconds of a training step from FLOPs, bytes and messages.

A micro-batch on a pipeline rank takes the sum of its operations: nothing but the messages named as hidden in
traffic.py runs beside another. The achievable fractions of the cluster's description are assumptions until
they are fitted to measurements.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from llada_megatron.config.contents import Contents, Parameters
from llada_megatron.config.families.gpt import attention_weights, expert_weights
from llada_megatron.config.flops import peak_flops
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.quantities import GB
from llada_megatron.config.schema import Config, LayoutConfig, ModelConfig
from llada_megatron.plan import activations, traffic
from llada_megatron.plan.memory import Units
from llada_megatron.plan.shapes import BYTES, Shape
from llada_megatron.plan.topology import Group

PASSES = 5
"""A kept byte is written and read in forward, read in backward, and its gradient is written and read."""
RECOMPUTED_PASSES = 2
"""A dropped byte is written and read once more."""

FORWARD_PASSES = 2
"""Of a forward pass without gradients: a byte is written and read."""

Parts = defaultdict[str, float]
"""Seconds by kind: gemm, expert gemm, attention, memory, and by process group."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a device achieves: FLOP/s by kind of kernel, bytes per second of its memory."""

    gemm: float
    grouped_gemm: float
    attention: float
    memory: float
    overlap: float
    """Share of the messages beside computation that it hides."""
    b: int

    def products(self, flops: float, weights: float, passes: float, *, grouped: bool = False) -> float:
        """Seconds of `passes` matrix products of `flops` each that read (or write) all the weights."""
        rate = self.grouped_gemm if grouped else self.gemm
        return passes * max(flops / rate, self.b * weights / self.memory)


def rates(config: Config) -> Rates:
    """Achievable rates of the cluster's devices in the run's precision."""
    cluster, b = config.cluster, BYTES[config.precision.dtype]
    peak = peak_flops(cluster, config.precision.dtype)
    return Rates(
        gemm=peak * cluster.gemm_efficiency,
        grouped_gemm=peak * cluster.grouped_gemm_efficiency,
        attention=peak * cluster.attention_efficiency,
        memory=cluster.memory_gb_per_sec * GB * cluster.memory_efficiency,
        overlap=cluster.message_overlap,
        b=b,
    )


@dataclass(frozen=True, slots=True)
class Pass:
    """What a micro-batch runs: forward and backward with what recompute repeats, or forward alone."""

    again: frozenset[str] = frozenset()
    """Modules whose forward recompute repeats."""
    forward_only: bool = False
    frozen: bool = False
    """Whether weights have no gradient: adapters have, whose own products are left out."""

    def products(self, module: str) -> int:
        """How often a product of the module's forward runs; backward is two, one for frozen weights."""
        if self.forward_only:
            return 1
        return 3 - (self.frozen and module != "core_attn") + (module in self.again)

    def memory(self, *, dropped: bool) -> int:
        """How often a byte passes through memory, one that is kept or one that recompute drops."""
        return FORWARD_PASSES if self.forward_only else PASSES + dropped * RECOMPUTED_PASSES

    def calls(self, message: traffic.Message, overlap: float) -> float:
        """How often a message is waited for."""
        if self.forward_only:
            return message.forward
        return message.calls(self.again) - overlap * message.hidden


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds of each building block for one micro-batch and kind of pass."""

    dense: Parts
    moe: Parts
    embedding: Parts
    head: Parts

    @property
    def totals(self) -> tuple[float, float, float, float]:
        """Seconds of a dense layer, a MoE layer, the embedding and the head."""
        parts = self.dense, self.moe, self.embedding, self.head
        dense, moe, embedding, head = (sum(part.values()) for part in parts)
        return dense, moe, embedding, head

    def of(self, counts: tuple[int, int, int, int]) -> Parts:
        """Of one micro-batch through so many dense layers, MoE layers, embeddings and heads."""
        result: Parts = defaultdict(float)
        for count, parts in zip(counts, (self.dense, self.moe, self.embedding, self.head), strict=True):
            for name, seconds in parts.items():
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
    blocks: Units,
    *,
    forward_only: bool = False,
) -> Seconds:
    """Seconds of every building block under a layout, forward and backward or in a pass without gradients."""
    runs, b = Pass(activations.recomputed_modules(layout), forward_only, model.lora.rank > 0), at.b

    def layer(moe: bool) -> Parts:
        parts = layer_products(model, shape, layout, at, runs, moe=moe)
        unit = blocks.moe if moe else blocks.dense
        touched = runs.memory(dropped=False) * unit.kept + runs.memory(dropped=True) * unit.dropped
        parts["memory"] = touched / at.memory
        messages = traffic.layer_messages(model, shape, layout, moe=moe, b=b)
        add(parts, exposed(messages, links, runs, at.overlap))
        return parts

    embedding: Parts = defaultdict(float)
    embedding["memory"] = runs.memory(dropped=False) * blocks.embedding.kept / at.memory
    add(embedding, exposed(traffic.embedding_messages(model, shape, layout, b=b), links, runs, at.overlap))
    return Seconds(layer(False), layer(True), embedding, _head(model, shape, layout, at, links, runs))


def layer_products(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, at: Rates, runs: Pass, *, moe: bool
) -> Parts:
    """Matrix products and attention of one layer.

    A product of 2 S weights FLOPs runs once in forward and twice in backward, once more when recomputed;
    attention has 4 head_dim FLOPs per visible pair and head in forward, twice that in backward.
    """
    tp = layout.tp

    def dense(module: str, rows: int, weights: float) -> float:
        return at.products(2 * rows * weights, weights, runs.products(module))

    pairs = 4 * model.head_dim * model.heads / tp * shape.pairs
    parts: Parts = defaultdict(float)
    parts["gemm"] = dense("attention", shape.rows, attention_weights(model) / tp)
    parts["attention"] = pairs * runs.products("core_attn") / at.attention
    if not moe:
        parts["gemm"] += dense("mlp", shape.rows, 3 * model.hidden_size * model.ffn_hidden_size / tp)
        return parts
    shared = 3 * model.hidden_size * model.shared_expert_hidden_size / tp
    parts["gemm"] += dense("shared_experts", shape.rows, shared)
    parts["gemm"] += dense("moe", shape.tokens, model.experts * model.hidden_size)
    one = expert_weights(model) / layout.etp
    here = model.experts // layout.ep
    passes = runs.products("moe")
    parts["expert gemm"] = at.products(2 * shape.routed * one, here * one, passes, grouped=True)
    return parts


def _head(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    at: Rates,
    links: dict[str, Group],
    runs: Pass,
) -> Parts:
    """Chunked logits run forward twice; they pass through memory in bf16 (or fp32) and in fp32."""
    chunks = -(-shape.supervised // model.head_chunk_tokens)
    runs = replace(runs, again=frozenset({"head"} if chunks > 1 else ()))
    weights = model.vocab_size / layout.tp * model.hidden_size
    passes = runs.products("head")
    logits = (4 + at.b) * shape.supervised * model.vocab_size / layout.tp
    parts: Parts = defaultdict(float)
    parts["gemm"] = passes * max(
        2 * shape.supervised * weights / at.gemm, chunks * at.b * weights / at.memory
    )
    parts["memory"] = runs.memory(dropped=chunks > 1) * logits / at.memory
    messages = traffic.head_messages(model, shape, layout, b=at.b)
    add(parts, exposed(messages, links, runs, at.overlap))
    return parts


def exposed(
    messages: Sequence[traffic.Message], links: dict[str, Group], runs: Pass, overlap: float
) -> Parts:
    """Seconds of the messages that nothing hides, by group."""
    parts: Parts = defaultdict(float)
    for message in messages:
        once = links[message.group].seconds(message.operation, message.payload)
        parts[message.group] += runs.calls(message, overlap) * once
    return parts


def add(parts: Parts, more: Parts) -> None:
    """Add seconds of the same kind up."""
    for name, seconds in more.items():
        parts[name] += seconds


def accumulation_seconds(held: Parameters, at: Rates) -> float:
    """Adding a micro-batch's gradients to the fp32 buffers: b written and b + 4 read, 4 written."""
    return (2 * at.b + 8) * held.trained / at.memory


def optimizer_seconds(held: Parameters, layout: LayoutConfig, at: Rates) -> float:
    """Clearing 4 bytes per gradient; per element updated here a norm (4), then gradient, weight and moments.

    The update reads 16 bytes and writes the fp32 weight, both moments and the weight itself: 12 + b.
    """
    mine = held.dense / (data_parallel_size(layout) * layout.cp)
    mine += held.expert / expert_data_parallel_size(layout)
    return (4 * held.trained + (4 + 16 + 12 + at.b) * mine) / at.memory


def message_seconds(messages: Sequence[traffic.Message], links: dict[str, Group]) -> dict[str, float]:
    """Seconds of a step's messages by what they carry: gradients, weights, or (empty) a tied head's sum."""
    seconds = {"gradients": 0.0, "weights": 0.0, "": 0.0}
    for message in messages:
        once = links[message.group].seconds(message.operation, message.payload)
        seconds[message.module] += message.calls(frozenset()) * once
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
