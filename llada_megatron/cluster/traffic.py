"""Messages of a process: per micro-batch in layers, embedding and head, and per step for gradients.

The payload of an all-gather is what comes out, of a reduce-scatter and an all-to-all what goes in. Legend as
in activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.cluster.shapes import Shape
from llada_megatron.config.parameters import Parameters
from llada_megatron.config.schema import Dispatcher, LayoutConfig, ModelConfig


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

    def calls(self, recomputed: frozenset[str]) -> int:
        return self.forward * (2 if self.module in recomputed else 1) + self.backward


def layer_messages(
    model: ModelConfig, shape: Shape, layout: LayoutConfig, *, moe: bool, b: int
) -> list[Message]:
    """Messages of one layer and micro-batch.

    tp   attention and a dense MLP or shared expert each gather their input [S, H] and scatter their output;
         backward gathers the output's gradient, gathers the input again for the weights' gradient and
         scatters the input's gradient. The last two run beside matrix products (megatron-core's layers.py).
    cp   clean keys and values [L, 2, g] gathered, their gradients scattered (attention/context.py)
    ep   copies of tokens [t k, H] out and back, both ways again in backward, and fp32 probabilities once
         each way; the busiest process's share. `allgather` sends every token [t ep etp, H] and its
         probabilities and map to all instead.
    etp  received copies [N, H] gathered and their outputs scattered, both again in backward
    """
    messages = _tensor_parallel("attention", shape, layout, model.hidden_size, b)
    if layout.cp > 1:
        keys = shape.gathered * 2 * model.kv_heads * model.head_dim // layout.tp * b
        messages.append(Message("cp", "all_gather", keys, 1, 0, module="core_attn"))
        messages.append(Message("cp", "reduce_scatter", keys, 0, 1, module="core_attn"))
    if not moe:
        return messages + _tensor_parallel("mlp", shape, layout, model.hidden_size, b)
    if model.shared_expert_hidden_size:
        messages += _tensor_parallel("shared_experts", shape, layout, model.hidden_size, b)
    if layout.dispatcher is Dispatcher.allgather:
        if layout.ep * layout.etp > 1:
            tokens = shape.tokens * layout.ep * layout.etp
            for operation in ("all_gather", "reduce_scatter"):
                messages.append(
                    Message("ep*etp", operation, b * tokens * model.hidden_size, 1, 1, module="moe")
                )
            scores = tokens * model.experts
            messages.append(Message("ep*etp", "all_gather", 5 * scores, 1, 0, module="moe"))
            messages.append(Message("ep*etp", "reduce_scatter", 4 * scores, 0, 1, module="moe"))
        return messages
    copies = shape.routed / layout.etp
    if layout.ep > 1:
        messages.append(Message("ep", "all_to_all", b * copies * model.hidden_size, 2, 2, module="moe"))
        messages.append(Message("ep", "all_to_all", 4 * copies, 1, 1, module="moe"))
    if layout.etp > 1:
        for operation in ("all_gather", "reduce_scatter"):
            payload = b * shape.routed * model.hidden_size
            messages.append(Message("etp", operation, payload, 1, 1, module="moe"))
    return messages


def embedding_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> list[Message]:
    """Partial rows [S, H] scattered in forward, their gradients gathered in backward."""
    payload = b * shape.rows * model.hidden_size
    if layout.tp == 1:
        return []
    return [Message("tp", "reduce_scatter", payload, 1, 0), Message("tp", "all_gather", payload, 0, 1)]


def head_messages(model: ModelConfig, shape: Shape, layout: LayoutConfig, *, b: int) -> list[Message]:
    """Hidden states gathered once for all chunks, their gradients scattered; three fp32 sums per row.

    The sums (largest logit, target's logit, sum of exponentials) are repeated where chunks are recomputed.
    """
    if layout.tp == 1:
        return []
    payload, n = b * shape.rows * model.hidden_size, shape.supervised
    sums = 3 * (2 if n > model.head_chunk_tokens else 1)
    return [
        Message("tp", "all_gather", payload, 1, 0),
        Message("tp", "reduce_scatter", payload, 0, 1),
        Message("tp", "all_reduce", 4 * n, sums, 0),
    ]


def boundary_message(model: ModelConfig, shape: Shape, *, b: int) -> Message:
    """Hidden states [t, H] between two pipeline stages, and their gradients back."""
    return Message("pp", "send", b * shape.tokens * model.hidden_size, 1, 1)


def step_messages(
    held: Parameters, model: ModelConfig, layout: LayoutConfig, *, b: int, holds_table: bool
) -> list[Message]:
    """Once per step: fp32 gradients scattered to the processes that update them, new weights gathered.

    A tied head that lies on another stage than the embedding also sums its gradient with the embedding's.
    """
    messages = []
    for group, elements in (("dp", held.dense), ("expert dp", held.expert)):
        if elements:
            messages.append(Message(group, "reduce_scatter", 4 * elements, 0, 1, module="gradients"))
            messages.append(Message(group, "all_gather", b * elements, 1, 0, module="weights"))
    if model.tied_head and layout.pp > 1 and holds_table:
        table = model.vocab_size // layout.tp * model.hidden_size
        messages.append(Message("pp", "all_reduce", 4 * table, 0, 1))
    return messages


def _tensor_parallel(module: str, shape: Shape, layout: LayoutConfig, hidden: int, b: int) -> list[Message]:
    if layout.tp == 1:
        return []
    payload = b * shape.rows * hidden
    return [
        Message("tp", "all_gather", payload, 1, 2, hidden=1, module=module),
        Message("tp", "reduce_scatter", payload, 1, 1, hidden=1, module=module),
    ]
