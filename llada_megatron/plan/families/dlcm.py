"""The `dlcm` family: `gpt`'s layers of tokens and of concepts, and what is between them (plan/concepts.py).

It has one pipeline stage, so its times are two blocks: the tokens up to their boundaries stand where another
family has its embedding, all behind them where it has its head. A pass before the step's own ends there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from llada_megatron.config.choices import ConceptAttention
from llada_megatron.config.concepts import CHANNELS
from llada_megatron.config.contents import Contents, Parameters
from llada_megatron.config.families.dlcm import concepts_of, tokens_of
from llada_megatron.config.schema import LayoutConfig, ModelConfig, Recompute
from llada_megatron.plan import activations, concepts, layer_time, memory, traffic
from llada_megatron.plan.layer_time import Block, Work
from llada_megatron.plan.memory import Unit, Units
from llada_megatron.plan.rates import Rates
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.timing import Seconds
from llada_megatron.plan.topology import Group
from llada_megatron.plan.traffic import Message

FOUND, TOLD = (45, 60), (20, 30)
"""Kernels in forward and backward around encoder and backbone; smoothing starts 5 more by doubling."""
ARRANGING = {ConceptAttention.ragged: 60e-9, ConceptAttention.replicated: 150e-9}
"""Seconds of the host per token: it reads the boundaries, which empties the device's queue, and works out
segments, who sees which concept and the backbone's mask (model/dlcm.py: on_host). Measured on one core, of
8,192 tokens."""
SMOOTHING_PASSES = 8
"""Over fp32 concepts for each doubling: a product, a sum and the parts laid together."""


@dataclass(frozen=True, slots=True)
class Parts(Units):
    """The whole model."""

    tokens: Unit
    """A layer of encoder or decoder."""
    found: Unit
    """From the encoder's last norm to the concepts."""
    dense: Unit
    """A layer of the backbone."""
    moe: Unit
    told: Unit
    """From the backbone's last norm to the decoder."""
    layers: tuple[int, int, int, int]
    """Of the encoder, dense and with experts of the backbone, of the decoder."""

    def of(self, contents: Contents) -> list[tuple[int, Unit]]:
        encoder, dense, moe, decoder = self.layers
        return [
            (1, self.embedding),
            (encoder, _named(self.tokens, "encoder")),
            (1, self.found),
            (dense, _named(self.dense, "backbone")),
            (moe, _named(self.moe, "backbone")),
            (1, self.told),
            (decoder, _named(self.tokens, "decoder")),
            (1, self.head),
            (1, self.stage),
        ]


def units(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> Parts:
    """Bytes of each building block under a layout.

    What is alive for a moment between the stacks is estimated: fp32 copies of h in the detector's backward,
    of concepts in the smoothing, gradients of queries, keys and values. The forward's own variables live to
    its end: what tokens were told, the sum with it, and concepts; the head reads a scaled copy.
    """
    tokens, backbone = tokens_of(model, 1), concepts_of(model)
    wide = concepts.of_concepts(model, shape, layout)
    at = concepts.sizes(model, shape, layout)
    around, inside = memory.units(tokens, shape, layout, b=b), memory.units(backbone, wide, layout, b=b)
    found = concepts.found_parts(model, shape, layout, b=b)
    told = concepts.told_parts(model, shape, layout, b=b)
    H, Hc, T = model.hidden_size, model.concepts.hidden_size, shape.rows
    heads = (model.heads + model.kv_heads) // layout.tp * model.head_dim
    runs_again = layout.recompute is Recompute.full
    runs_again |= backbone.has_experts and "moe" in activations.recomputed_modules(layout)
    padding = at.rows if runs_again else 0  # which rows are
    waiting = b * ((2 * T + shape.tokens) * H + at.concepts * Hc)
    stage = around.stage.kept + inside.stage.kept + padding
    return Parts(
        embedding=around.embedding,
        head=replace(around.head, forward=around.head.forward + waiting),
        stage=replace(
            around.stage,
            parts={"stage": stage},
            kept=stage,
            forward=around.stage.forward + 4 * T,  # the draws
        ),
        gathering=max(around.gathering, inside.gathering),
        hidden=around.hidden,
        clipping=around.clipping,
        tokens=around.dense,
        found=Unit(found, sum(found.values()), forward=8 * T * H, backward=24 * T * H),
        dense=inside.dense,
        moe=inside.moe,
        told=Unit(
            told,
            sum(told.values()),
            forward=max(16 * at.concepts * Hc, b * T * H),
            backward=max(20 * at.concepts * Hc, b * (2 * T * H + 3 * T * heads)),
        ),
        layers=_layers(model),
    )


def seconds_of(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    at: Rates,
    links: dict[str, Group],
    blocks: Parts,
    *,
    forward_only: bool = False,
) -> Seconds:
    """Seconds of both blocks; a pass without gradients ends with the boundaries."""
    again = activations.recomputed_modules(layout)
    tokens = Work(tokens_of(model, 1), shape, layout, at, links, again, forward_only)
    encoder, dense, moe, decoder = _layers(model)
    given = tokens, model, layout
    before, behind = Block(), Block()
    _add(before, 1, layer_time.embedding(tokens, blocks))
    _add(before, encoder, layer_time.layer(tokens, blocks.tokens, moe=False))
    _add(before, 1, _found(*given, blocks.found))
    if not forward_only:
        inside = concepts_of(model)
        wide = replace(tokens, model=inside, shape=concepts.of_concepts(model, shape, layout))
        _add(behind, dense, layer_time.layer(wide, blocks.dense, moe=False))
        _add(behind, moe, layer_time.layer(wide, blocks.moe, moe=True))
        _add(behind, 1, _told(*given, blocks.told))
        behind.forward.add("attention", "boundaries", ARRANGING[model.concepts.attention] * shape.rows)
        _add(behind, decoder, layer_time.layer(tokens, blocks.tokens, moe=False))
        _add(behind, 1, layer_time.head_alone(tokens))
    return Seconds(Block(), Block(), before, behind)


def of_rank(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    held: Parameters,
    stages: Sequence[Contents],
    micro_batches: int,
    *,
    b: int,
    gradient_bytes: int = 4,
    passes_before: int = 0,
) -> Iterator[tuple[int, Message]]:
    """Every message of a step, and how often it is sent; passes before the step's own end with boundaries."""
    again = activations.recomputed_modules(layout)
    tokens, backbone = tokens_of(model, 1), concepts_of(model)
    wide = concepts.of_concepts(model, shape, layout)
    encoder, dense, moe, decoder = _layers(model)
    of_tokens = traffic.layer_messages(tokens, shape, layout, moe=False, b=b)
    before = (
        (1, traffic.embedding_messages(tokens, shape, layout, b=b)),
        (encoder, of_tokens),
        (1, concepts.found_messages(model, shape, layout, b=b)),
    )
    behind = (
        (dense, traffic.layer_messages(backbone, wide, layout, moe=False, b=b)),
        (moe, traffic.layer_messages(backbone, wide, layout, moe=True, b=b) if moe else []),
        (1, concepts.told_messages(model, shape, layout, b=b)),
        (decoder, of_tokens),
        (1, traffic.head_messages(tokens, shape, layout, b=b)),
    )
    for number, messages in (*before, *behind):
        for message in messages:
            yield number * micro_batches * message.calls(again), message
    for number, messages in before:
        for message in messages:
            yield number * micro_batches * passes_before * message.forward, message
    yield 1, concepts.PARSER
    for message in traffic.step_messages(
        held, model, layout, b=b, holds_table=True, gradient_bytes=gradient_bytes
    ):
        yield message.calls(again), message


def assumed_of_shapes(model: ModelConfig) -> list[str]:
    """How many concepts there are, and where the encoder runs alone."""
    R = model.concepts.tokens_per_concept
    return [
        f"in every micro-batch one token in {R:g} opens a concept (model.concepts.tokens_per_concept)",
        "a pass before the step's own is the encoder's alone",
    ]


def assumed_of_times(model: ModelConfig) -> list[str]:
    """How long a forward waits for its boundaries."""
    per_token = 1e9 * ARRANGING[model.concepts.attention]
    return [
        "once in a forward the device waits for the host, which makes of boundaries what concepts are and who"
        f" sees them in {per_token:.0f} ns a token"
    ]


def _layers(model: ModelConfig) -> tuple[int, int, int, int]:
    moe = model.layers - model.dense_layers
    dense = model.concepts.backbone_layers(model.layers) - moe
    return model.concepts.encoder_layers, dense, moe, model.concepts.decoder_layers


def _named(unit: Unit, name: str) -> Unit:
    """A layer that is reported as one part."""
    return replace(unit, parts={name: unit.kept})


def _found(work: Work, model: ModelConfig, layout: LayoutConfig, unit: Unit) -> Block:
    """Detector, means and their projection, whole on every process; a pass before ends with the detector."""
    block, H = Block(), model.hidden_size
    at = concepts.sizes(model, work.shape, layout)
    work.product(block, "attention", "", work.shape.rows, 2 * H * H, quantised=False)
    if work.forward_only:
        work.passes(block, "attention", unit.kept - unit.parts["pooling"], 0)
    else:
        weights = H * model.concepts.hidden_size
        work.product(block, "attention", "", at.concepts, weights, quantised=False)
        work.passes(block, "attention", unit.kept, 0)
    work.messages(block, concepts.found_messages(model, work.shape, layout, b=work.at.b))
    _launch(work, block, FOUND)
    return block


def _told(work: Work, model: ModelConfig, layout: LayoutConfig, unit: Unit) -> Block:
    """Smoothing, and attention to concepts."""
    block, shape, tp = Block(), work.shape, layout.tp
    at, Hc, width = concepts.sizes(model, shape, layout), model.concepts.hidden_size, model.head_dim
    key_width = 2 * Hc * model.kv_heads * width // tp
    query_width = 2 * model.hidden_size * model.heads * width // tp  # and of the output
    for rows, weights in ((shape.rows, query_width), (at.keys, key_width)):
        work.product(block, "attention", "", rows, weights, quantised=False)
    pairs, channels = shape.pairs / model.concepts.tokens_per_concept, width
    if model.concepts.attention is ConceptAttention.replicated:
        pairs, channels = shape.pairs, width + CHANNELS
    once = 4 * channels * model.heads / tp * pairs / work.at.attention
    doublings = max(at.concepts - 1, 1).bit_length()
    smoothing = SMOOTHING_PASSES * 4 * at.concepts * Hc * doublings / work.at.memory
    for way, times in ((block.forward, 1), (block.backward, 2)):
        way.add("attention", "attention", times * once)
        way.add("attention", "memory", smoothing)
    work.passes(block, "attention", unit.kept, 0)
    work.messages(block, concepts.told_messages(model, shape, layout, b=work.at.b))
    _launch(work, block, (TOLD[0] + 5 * doublings, TOLD[1] + 5 * doublings))
    return block


def _launch(work: Work, block: Block, kernels: tuple[int, int]) -> None:
    """It takes at least as long as the host needs to start its kernels."""
    for way, count in zip((block.forward, block.backward), kernels, strict=True):
        if way.sides:
            way.add("attention", "launches", max(0.0, count * work.at.launch - way.of()))


def _add(total: Block, times: int, block: Block) -> None:
    for way, more in ((total.forward, block.forward), (total.backward, block.backward)):
        for side, kinds in more.sides.items():
            for kind, seconds in kinds.items():
                way.add(side, kind, times * seconds)
