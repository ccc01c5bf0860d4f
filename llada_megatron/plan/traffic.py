"""Messages of a process: per micro-batch in layers, embedding and head, and per step for gradients.

The payload of an all-gather is what comes out, of a reduce-scatter and an all-to-all what goes in. Legend as
in activations.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llada_megatron.config.contents import Contents, Parameters
from llada_megatron.config.schema import Dispatcher, LayoutConfig, ModelConfig
from llada_megatron.plan import latents
from llada_megatron.plan.activations import gathered_tokens, recomputed_modules
from llada_megatron.plan.dispatch import flex_bytes
from llada_megatron.plan.memory import padded_buffers
from llada_megatron.plan.shapes import Shape
from llada_megatron.plan.topology import Group


@dataclass(frozen=True, slots=True)
class Message:
    """A kind of message, and how often a micro-batch sends it."""

    group: str
    operation: str
    payload: float
    """Bytes."""
    forward: int
    """Calls in the forward pass; recompute of the module repeats them."""
    backward: int
    hidden: int = 0
    """Of the backward calls those that run beside matrix products."""
    module: str = ""
    network: float = 0.0
    """Bytes through the network, where `operation` is `exchange`; the payload then stays inside nodes."""

    def seconds(self, links: dict[str, Group]) -> float:
        """Of one call, as if nothing hid it."""
        return links[self.group].seconds(self.operation, self.payload, self.network)

    def calls(self, recomputed: frozenset[str]) -> int:
        return self.forward * (2 if self.module in recomputed else 1) + self.backward


def layer_messages(
    model: ModelConfig,
    shape: Shape,
    layout: LayoutConfig,
    *,
    moe: bool,
    b: int,
    behind: Shape | None = None,
) -> list[Message]:
    """Messages of one layer and micro-batch; `behind` its attention the last one may have fewer rows.

    tp   attention and a dense MLP or shared expert each gather their input [S, H] and scatter their output;
         backward gathers the output's gradient, gathers the input again for the weights' gradient and
         scatters the input's gradient. The last two run beside matrix products (megatron-core's layers.py).
         With model.mla the widths of latents.py are gathered.
         A shared expert that computes while tokens travel keeps its gathered input.
         Where fewer rows go on, those of the residual [t, H] change ranks, and their gradients come back.
    cp   clean keys and values [L, 2, g] gathered, their gradients scattered (attention/context.py)
    tp*cp  with pools of experts the best score of each expert in each block, fp32 [P, E]
    ep*etp  each process's count of tokens for every expert, int64
    ep   copies of tokens [t k, H] out and back, both ways again in backward, and fp32 probabilities once
         each way; the busiest process's share. `allgather` sends every token [t ep etp, H] and its
         probabilities and map to all instead, and sums what comes back in fp32. `deepep` and `hybridep`
         send a token once to each node and rank, with its experts and probabilities (dispatch.py).
    etp  received copies [N, H] and their fp32 probabilities gathered, outputs scattered in fp32 (the
         dispatcher casts them to the probabilities' type); the reverse in backward
    """
    behind = behind or shape
    messages = _attention(model, shape, behind, layout, b)
    if layout.cp > 1:
        keys = shape.gathered * model.kv_heads * (model.head_dim + model.value_dim) // layout.tp * b
        messages.append(Message("cp", "all_gather", keys, 1, 0, module="core_attn"))
        messages.append(Message("cp", "reduce_scatter", keys, 0, 1, module="core_attn"))
    if not moe:
        return messages + _tensor_parallel("mlp", behind, behind, layout, model.hidden_size, b)
    return messages + _moe_messages(model, behind, layout, b)


def _moe_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, b: int) -> list[Message]:
    """Those of a layer's experts, and of what comes with them."""
    messages: list[Message] = []
    if model.shared_expert_hidden_size:
        keeps = layout.overlap_shared_experts
        messages += _tensor_parallel(
            "shared_experts", shape, shape, layout, model.hidden_size, b, keeps_input=keeps
        )
    if model.expert_capacity and layout.tp * layout.cp > 1:
        best = 4 * shape.blocks * model.experts
        messages.append(Message("tp*cp", "all_reduce", best, 1, 0, module="moe"))
    if layout.dispatcher is Dispatcher.allgather:
        return messages + _to_all(model, shape, layout, b)
    if layout.dispatcher.is_flex:
        return messages + _flex(model, shape, layout, b)
    if layout.ep * layout.etp > 1:
        counts = 8 * model.experts * layout.ep * layout.etp
        messages.append(Message("ep*etp", "all_gather", counts, 1, 0, module="moe"))
    copies = shape.routed / layout.etp
    if layout.ep > 1:
        messages.append(Message("ep", "all_to_all", b * copies * model.hidden_size, 2, 2, module="moe"))
        messages.append(Message("ep", "all_to_all", 4 * copies, 1, 1, module="moe"))
    if layout.etp > 1:
        received, combined = b * shape.routed * model.hidden_size, 4 * shape.routed * model.hidden_size
        probabilities = 4 * shape.routed
        messages += [
            Message("etp", "all_gather", received, 1, 0, module="moe"),
            Message("etp", "all_gather", probabilities, 1, 0, module="moe"),
            Message("etp", "reduce_scatter", combined, 1, 0, module="moe"),
            Message("etp", "all_gather", combined, 0, 1, module="moe"),
            Message("etp", "reduce_scatter", received, 0, 1, module="moe"),
            Message("etp", "reduce_scatter", probabilities, 0, 1, module="moe"),
        ]
    return messages


def embedding_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> list[Message]:
    """Partial rows [S, H] scattered in forward, their gradients gathered in backward."""
    payload = b * shape.rows * model.hidden_size
    if layout.tp == 1:
        return []
    return [Message("tp", "reduce_scatter", payload, 1, 0), Message("tp", "all_gather", payload, 0, 1)]


def head_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> list[Message]:
    """Hidden states gathered once for all chunks, their gradients scattered; the readout's sums per row.

    The sums (of a cross entropy largest logit, target's logit, sum of exponentials, fp32) are repeated where
    chunks are recomputed.
    """
    if layout.tp == 1:
        return []
    payload, n = b * shape.rows * model.hidden_size, shape.supervised
    again = n > model.head_chunk_tokens
    return [
        Message("tp", "all_gather", payload, 1, 0),
        Message("tp", "reduce_scatter", payload, 0, 1),
        *(
            Message("tp", "all_reduce", size * n, calls, calls * again)
            for size, calls in Counter(shape.row_bytes.sums).items()
        ),
    ]


def boundary_message(model: ModelConfig, shape: Shape, *, b: int) -> Message:
    """Hidden states [t, H] to the next pipeline stage, or their gradients to the one before."""
    return Message("pp", "send", b * shape.tokens * model.hidden_size, 1, 0)


def step_messages(
    held: Parameters,
    model: ModelConfig,
    layout: LayoutConfig,
    *,
    b: int,
    holds_table: bool,
    gradient_bytes: int = 4,
) -> list[Message]:
    """Once per step: gradients scattered to the processes that update them, new weights gathered.

    Experts with buffers of their own have an optimizer of their own, and without layout.overlap_param_gather
    each of the two gathers the weights of both (distrib_optimizer.py, step_with_ready_grads).
    Tensor-parallel processes sum the gradients of what each holds whole and has seen a part with. A tied
    head that lies on another stage than the embedding also sums its gradient with the embedding's. Counts of
    tokens per expert are summed for the balance. A few scalars and the metrics' sums are left out.
    """
    dense, expert = padded_buffers(held, layout)
    gathers = 2 if expert and not layout.overlap_param_gather else 1
    messages = []
    for group, elements in (("dp", dense), ("expert dp", expert)):
        if elements:
            scattered = gradient_bytes * elements
            messages.append(Message(group, "reduce_scatter", scattered, 0, 1, module="gradients"))
            messages.append(Message(group, "all_gather", b * elements, gathers, 0, module="weights"))
    if layout.tp > 1:
        summed = gradient_bytes * (held.replicated - held.alike)
        messages.append(Message("tp", "all_reduce", summed, 0, 1, module="gradients"))
    if model.tied_head and layout.pp > 1 and holds_table:
        table = model.vocab_size // layout.tp * model.hidden_size
        messages.append(Message("embedding", "all_reduce", gradient_bytes * table, 0, 1))
    if held.counts:
        messages.append(Message("tp*dp", "all_reduce", 4 * held.counts, 0, 1))
    return messages


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
    """Every message of a step on a pipeline rank that holds these stages, and how often it is sent.

    passes_before: forward passes over its micro-batches before the step's own.
    """
    again = recomputed_modules(layout)
    behind = shape.behind_last
    units = (
        layer_messages(model, shape, layout, moe=False, b=b),
        layer_messages(model, shape, layout, moe=True, b=b),
        layer_messages(model, shape, layout, moe=model.has_experts, b=b, behind=behind),
        embedding_messages(model, shape, layout, b=b),
        head_messages(model, behind, layout, b=b),
    )
    units_before = (*units[:4], head_messages(model, behind.before, layout, b=b))
    boundary = boundary_message(model, shape, b=b)
    for stage in stages:
        numbers = *stage.before_last, stage.last_layers, stage.first, stage.last
        for number, messages, messages_before in zip(numbers, units, units_before, strict=True):
            for message in messages:
                yield number * micro_batches * message.calls(again), message
            for message in messages_before:
                yield number * micro_batches * passes_before * message.forward, message
        yield micro_batches * ((not stage.first) + (1 + passes_before) * (not stage.last)), boundary
    holds_table = stages[0].first or stages[-1].last
    once = step_messages(held, model, layout, b=b, holds_table=holds_table, gradient_bytes=gradient_bytes)
    for message in once:
        yield message.calls(again), message


def _to_all(model: ModelConfig, shape: Shape, layout: LayoutConfig, b: int) -> list[Message]:
    """Of experts that get the tokens of all processes."""
    if layout.ep * layout.etp == 1:
        return []
    tokens = gathered_tokens(shape, layout)
    sent, combined = b * tokens * model.hidden_size, 4 * tokens * model.hidden_size
    scores = tokens * model.experts
    return [
        Message("ep*etp", "all_gather", sent, 1, 0, module="moe"),
        Message("ep*etp", "reduce_scatter", combined, 1, 0, module="moe"),
        Message("ep*etp", "all_gather", combined, 0, 1, module="moe"),
        Message("ep*etp", "reduce_scatter", sent, 0, 1, module="moe"),
        Message("ep*etp", "all_gather", 5 * scores, 1, 0, module="moe"),
        Message("ep*etp", "reduce_scatter", 4 * scores, 0, 1, module="moe"),
    ]


def _flex(model: ModelConfig, shape: Shape, layout: LayoutConfig, b: int) -> list[Message]:
    """To experts and back, both ways again in backward; the two groups of ep and etp are one."""
    if layout.ep * layout.etp == 1:
        return []
    inside, outside = flex_bytes(model, shape, layout, b=b)
    return [Message("ep*etp", "exchange", inside, 2, 2, module="moe", network=outside)]


def _attention(
    model: ModelConfig, shape: Shape, behind: Shape, layout: LayoutConfig, b: int
) -> list[Message]:
    if not model.mla.is_used or layout.tp == 1:
        return _tensor_parallel("attention", shape, behind, layout, model.hidden_size, b)
    messages = [
        Message("tp", "reduce_scatter", b * shape.rows * model.hidden_size, 1, 0, module="attention"),
        Message("tp", "all_gather", b * shape.rows * model.hidden_size, 0, 1, module="attention"),
    ]
    for width, there, back, scattered, module in latents.gathered_widths(model):
        payload, beside = b * shape.rows * width, min(back, scattered)
        gathers = Message("tp", "all_gather", payload, there, back, hidden=beside, module=module)
        scatters = Message("tp", "reduce_scatter", payload, 0, scattered, hidden=beside, module=module)
        messages += [gathers, scatters]
    return [message for message in messages if message.forward or message.backward]


def _tensor_parallel(
    module: str,
    shape: Shape,
    behind: Shape,
    layout: LayoutConfig,
    hidden: int,
    b: int,
    *,
    keeps_input: bool = False,
) -> list[Message]:
    if layout.tp == 1:
        return []
    given, back, again = b * shape.rows * hidden, b * behind.rows * hidden, int(not keeps_input)
    if given == back:
        return [
            Message("tp", "all_gather", given, 1, 1 + again, hidden=again, module=module),
            Message("tp", "reduce_scatter", given, 1, 1, hidden=again, module=module),
        ]
    return [
        Message("tp", "all_gather", given, 1, 1, hidden=1, module=module),
        Message("tp", "all_gather", back, 0, 1, module=module),
        Message("tp", "reduce_scatter", back, 1, 0, module=module),
        Message("tp", "reduce_scatter", given, 0, 1, hidden=1, module=module),
        Message("tp", "all_to_all", given / layout.tp, 1, 0, module=module),
        Message("tp", "all_to_all", back / layout.tp, 0, 1, module=module),
    ]
