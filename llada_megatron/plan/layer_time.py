"""Seconds of one layer, embedding or head for a micro-batch, and what of them runs beside another's.

Legend as in activations.py. A layer's operations lie on four sides, since the exchange may run beside the
others: attention (with norms and router), shared (the shared expert), experts, exchange (tokens to experts
and back).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from llada_megatron.config.families.gpt import expert_weights
from llada_megatron.config.families.gpt_attention import (
    attention_weights,
    attention_widths,
    pair_flops,
    up_weights,
)
from llada_megatron.config.schema import LayoutConfig, ModelConfig
from llada_megatron.plan import launches, traffic
from llada_megatron.plan.memory import Layers, Unit, Units
from llada_megatron.plan.rates import Rates
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.topology import Group
from llada_megatron.plan.unfused import unfused_bytes

KEPT_FORWARD, KEPT_BACKWARD = 2, 3
"""A kept byte is written and read in forward, read in backward, and its gradient is written and read."""
RECOMPUTED = 2
"""A dropped byte is written and read once more, in backward."""
EXCHANGE = ("ep", "ep*etp", "etp")
"""Groups through which tokens travel to experts."""

Parts = defaultdict[str, float]
"""Seconds by kind: gemm, expert gemm, attention, memory, launches, host, and by process group."""


@dataclass(slots=True)
class Direction:
    """Forward or backward, by side of the layer and kind."""

    sides: dict[str, Parts] = field(default_factory=lambda: defaultdict(lambda: defaultdict(float)))

    def add(self, side: str, kind: str, seconds: float) -> None:
        if seconds:
            self.sides[side][kind] += seconds

    def of(self, *sides: str) -> float:
        """Seconds of these sides, of all of them without any."""
        return sum(
            sum(self.sides[side].values()) for side in (sides or tuple(self.sides)) if side in self.sides
        )


@dataclass(slots=True)
class Block:
    """Seconds of one building block for one micro-batch."""

    forward: Direction = field(default_factory=Direction)
    backward: Direction = field(default_factory=Direction)
    paired: float = 0.0
    """What is spared where another micro-batch runs its backward beside this one's forward."""

    @property
    def parts(self) -> Parts:
        """By kind, in both directions."""
        result: Parts = defaultdict(float)
        for direction in (self.forward, self.backward):
            for kinds in direction.sides.values():
                add(result, kinds)
        return result

    @property
    def total(self) -> float:
        return self.forward.of() + self.backward.of()


def add(parts: Parts, more: dict[str, float]) -> None:
    """Add seconds of the same kind up."""
    for name, seconds in more.items():
        parts[name] += seconds


@dataclass(frozen=True, slots=True)
class Work:
    """What blocks are timed for: sizes, split, rates, links, and what a micro-batch runs."""

    model: ModelConfig
    shape: Shape
    layout: LayoutConfig
    at: Rates
    links: dict[str, Group]
    again: frozenset[str]
    """Modules whose forward recompute repeats."""
    forward_only: bool
    """A pass without gradients, before a step's own."""

    @property
    def frozen(self) -> bool:
        """Whether weights have no gradient: adapters have, whose own products are left out."""
        return self.model.lora.rank > 0

    def product(
        self,
        block: Block,
        side: str,
        module: str,
        rows: float,
        weights: float,
        *,
        grouped: bool = False,
        quantised: bool = True,
    ) -> None:
        """A product of 2 rows weights FLOPs: once in forward, twice in backward (one for frozen weights)."""
        once = self.at.products(2 * rows * weights, weights, 1, grouped=grouped, quantised=quantised)
        kind = "expert gemm" if grouped else "gemm"
        block.forward.add(side, kind, once)
        if not self.forward_only:
            block.backward.add(side, kind, (2 - self.frozen + (module in self.again)) * once)

    def quantise(self, block: Block, side: str, inputs: int, outputs: int) -> None:
        """Inputs of products are made FP8 in forward, gradients of their outputs in backward."""
        block.forward.add(side, "memory", self.at.quantising(inputs))
        if not self.forward_only:
            block.backward.add(side, "memory", self.at.quantising(outputs))

    def passes(self, block: Block, side: str, kept: float, dropped: float) -> None:
        """Passes over memory of what a part keeps, and of what recompute drops of it."""
        whole, memory = kept + dropped, self.at.memory
        block.forward.add(side, "memory", KEPT_FORWARD * whole / memory)
        if not self.forward_only:
            block.backward.add(side, "memory", (KEPT_BACKWARD * whole + RECOMPUTED * dropped) / memory)

    def messages(self, block: Block, messages: Iterable[traffic.Message]) -> None:
        """What is waited for of messages, less those that run beside products."""
        for message in messages:
            side = _side(message)
            once = message.seconds(self.links)
            again = message.forward * (message.module in self.again)
            block.forward.add(side, message.group, message.forward * once)
            if not self.forward_only:
                waited = message.backward + again - self.at.overlap * message.hidden
                block.backward.add(side, message.group, waited * once)


def _side(message: traffic.Message) -> str:
    if message.module == "shared_experts":
        return "shared"
    return "exchange" if message.module == "moe" and message.group in EXCHANGE else "attention"


def layer(work: Work, unit: Unit, *, moe: bool, behind: Shape | None = None) -> Block:
    """Seconds of one layer; `behind` its attention the last one may have fewer rows."""
    block, behind = Block(), behind or work.shape
    _products(work, block, behind, moe=moe)
    for part in unit.whole:
        if part == "between":  # it lies there longer, and is no oftener written or read
            continue
        side = {"experts": "experts", "shared_experts": "shared"}.get(part, "attention")
        kept = unit.parts.get(part, 0)
        work.passes(block, side, kept, unit.whole[part] - kept)
    rotary_alone = work.at.fused and work.layout.cp > 1 and work.shape.samples > 1
    if work.at.spreads or rotary_alone:
        given = work.model, behind, work.layout
        for side, there, back in unfused_bytes(*given, moe=moe, rotary_alone=rotary_alone, b=work.at.b):
            block.forward.add(side, "memory", there / work.at.memory)
            if not work.forward_only:
                block.backward.add(side, "memory", back / work.at.memory)
    given = work.model, work.shape, work.layout
    work.messages(block, traffic.layer_messages(*given, moe=moe, b=work.at.b, behind=behind))
    _hide(work, block, unit, moe=moe)
    return block


def _products(work: Work, block: Block, behind: Shape, *, moe: bool) -> None:
    """Matrix products and attention; backward has twice the FLOPs of a visible pair."""
    model, shape, layout, at = work.model, work.shape, work.layout, work.at
    tp, H, S, N = layout.tp, model.hidden_size, shape.rows, behind.routed
    inputs, outputs = attention_widths(model)
    up = up_weights(model) / tp
    weights = attention_weights(model) / tp - up
    ended = (S - behind.rows) * model.heads * model.value_dim // tp * H / weights  # rows of output projection
    work.product(block, "attention", "attention", S - ended, weights)
    if up:
        work.product(block, "attention", "mla_up_proj", S, up)
    work.quantise(block, "attention", S * (H + inputs // tp), S * (H + outputs // tp))
    pairs = pair_flops(model) / model.layers / tp * shape.pairs / at.attention
    block.forward.add("attention", "attention", pairs)
    if not work.forward_only:
        block.backward.add("attention", "attention", (2 + ("core_attn" in work.again)) * pairs)
    S = behind.rows
    if not moe:
        F = model.ffn_hidden_size // tp
        work.product(block, "attention", "mlp", S, 3 * H * F)
        work.quantise(block, "attention", S * (H + F), S * (2 * F + H))
        return
    Fs, Fe = model.shared_expert_hidden_size // tp, model.expert_hidden_size // layout.etp
    if Fs:
        work.product(block, "shared", "shared_experts", S, 3 * H * Fs)
        work.quantise(block, "shared", S * (H + Fs), S * (2 * Fs + H))
    work.product(block, "attention", "moe", behind.tokens, model.experts * H, quantised=False)
    one, here = expert_weights(model) / layout.etp, model.experts // layout.ep
    once = at.products(2 * N * one, here * one, 1, grouped=True, quantised=True)
    block.forward.add("experts", "expert gemm", once)
    if not work.forward_only:
        passes = 2 - work.frozen + ("moe" in work.again)
        block.backward.add("experts", "expert gemm", passes * once)
    work.quantise(block, "experts", N * (H + Fe), N * (2 * Fe + H))


def _hide(work: Work, block: Block, unit: Unit, *, moe: bool) -> None:
    """What the layout's overlaps take away, and what offloading and the host's starts of kernels add."""
    layout, at = work.layout, work.at
    directions = [block.forward] if work.forward_only else [block.forward, block.backward]
    if layout.overlap_tensor_parallel:
        for way in directions:
            for side in way.sides.values():
                if "tp" in side:
                    side["tp"] -= at.overlap * min(side["tp"], side["gemm"])
    if moe and layout.overlap_shared_experts:
        for way in directions:
            _beside(way.sides["exchange"], at.exchange_overlap * min(way.of("exchange"), way.of("shared")))
    if at.host and not work.forward_only:
        seconds = unit.host / at.host
        for way in directions:
            way.add("attention", "host", max(0.0, seconds - at.overlap * way.of()))
    paired = 0.0
    if moe and layout.overlap_experts and not work.forward_only:
        paired = _paired(block, at, delayed=layout.delay_weight_gradients)
    if at.launch:
        there, back = launches.kernels(work.model, layout, at, work.again, moe=moe)
        alone = [way.of() for way in directions]
        for way, count, waited in zip(directions, (there, back), alone, strict=False):
            way.add("attention", "launches", max(0.0, count * at.launch - waited))
        together = max(sum(alone) - paired, (there + back) * at.launch)
        paired = sum(way.of() for way in directions) - together if paired else 0.0
    block.paired = paired


def _beside(exchange: Parts, hidden: float) -> None:
    """Take hidden seconds off the exchange, in proportion."""
    whole = sum(exchange.values()) or 1.0
    for group in exchange:
        exchange[group] *= 1 - hidden / whole


def _paired(block: Block, at: Rates, *, delayed: bool) -> float:
    """Seconds that a forward and a backward of the layer spare where they run together.

    As megatron-core orders them (TransformerLayerSchedulePlan.run), on two streams:

        exchange   back combines   | forward dispatches | back dispatches   | forward combines
        products   forward, before | back, experts      | forward, experts  | back, before

    "before" is all in front of the dispatch, shared expert and router among it. Weight gradients of experts,
    a pass of their product, run in the second slot, or `delayed` in the third.
    """
    before = block.forward.of("attention", "shared"), block.backward.of("attention", "shared")
    experts = block.forward.of("experts"), block.backward.of("experts")
    exchanged = block.forward.of("exchange") / 2, block.backward.of("exchange") / 2
    later = block.forward.sides["experts"]["expert gemm"] if delayed else 0.0
    slots = (
        (exchanged[1], before[0]),
        (exchanged[0], experts[1] - later),
        (exchanged[1], experts[0] + later),
        (exchanged[0], before[1]),
    )
    return at.exchange_overlap * sum(min(message, product) for message, product in slots)


def embedding(work: Work, units: Units) -> Block:
    """Seconds of the embedding."""
    block = Block()
    work.passes(block, "attention", units.embedding.kept, 0)
    work.messages(block, traffic.embedding_messages(work.model, work.shape, work.layout, b=work.at.b))
    return block


def head(work: Work, units: Layers) -> Block:
    """Seconds of the head, and what the last layer takes beyond another of its kind: less, if anything."""
    block = head_alone(replace(work, shape=work.shape.behind_last))
    if units.last is None:
        return block
    moe = work.model.has_experts
    last = layer(work, units.last, moe=moe, behind=work.shape.behind_last)
    whole = layer(work, units.moe if moe else units.dense, moe=moe)
    for sign, layers in ((1, last), (-1, whole)):
        for way, of_layer in ((block.forward, layers.forward), (block.backward, layers.backward)):
            for side, kinds in of_layer.sides.items():
                for kind, seconds in kinds.items():
                    way.add(side, kind, sign * seconds)
    return block


def head_alone(work: Work) -> Block:
    """Seconds of the head. Chunked logits run forward twice; they pass through memory in the run's dtype and
    in fp32."""
    model, shape, layout, at = work.model, work.shape, work.layout, work.at
    block, chunks = Block(), -(-shape.supervised // model.head_chunk_tokens)
    weights = model.vocab_size / layout.tp * model.hidden_size
    once = max(2 * shape.supervised * weights / at.gemm, chunks * at.b * weights / at.memory)
    logits = (4 + at.b) * shape.supervised * model.vocab_size / layout.tp
    block.forward.add("attention", "gemm", once)
    if not work.forward_only:
        block.backward.add("attention", "gemm", (2 - work.frozen + (chunks > 1)) * once)
    dropped = logits if chunks > 1 else 0.0
    work.passes(block, "attention", logits - dropped, dropped)
    work.messages(block, traffic.head_messages(model, shape, layout, b=at.b))
    return block
