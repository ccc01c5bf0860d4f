"""Parameters of a process, by what divides them: tensor parallelism, nothing, or expert parallelism.

Legend: H hidden_size, F ffn_hidden_size, Fe and Fs expert and shared_expert hidden sizes, nh heads, ng
kv_heads, hd head_dim, E experts, V vocab_size.

    a layer's attention    H (nh + 2 ng) hd + nh hd H              / tp
    a layer's norms        2H, and 2 hd with qk_norm               replicated over tp
    a dense layer          3 H F (gate and up in one, and down)    / tp
    a MoE layer            3 H Fs of the shared expert             / tp
                           E H of the router                       replicated over tp
                           3 H Fe E of the experts                 / (ep etp)
                           E of expert_bias, fp32, no gradient     replicated
    embedding, head        V H each                                / tp, on the first and the last stage
    final norm             H                                       replicated, on the last stage

A tied head is the embedding where one stage holds both, and a copy of it on the last stage otherwise; the
copy counts on its process and not in the total.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llada_megatron.config.layout import pipeline_stages
from llada_megatron.config.schema import LayoutConfig, ModelConfig, PrecisionConfig

ALIGNED, BUFFER_MULTIPLE = 64, 128
"""What a parameter's start and a buffer's size are multiples of (megatron-core's param_layout.py)."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What one (virtual) pipeline stage holds."""

    dense: int
    """Dense layers."""
    moe: int
    first: bool
    """Embeds."""
    last: bool
    """Computes the final norm, the head and the loss."""

    @property
    def layers(self) -> int:
        return self.dense + self.moe


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements on one process."""

    sharded: int
    """Divided by tensor parallelism."""
    replicated: int
    """Whole on every tensor-parallel process."""
    expert: int
    bias: int
    """Elements of expert_bias: buffers, which have neither gradient nor optimizer state."""
    buffers: tuple[tuple[int, int], ...] = ()
    """Of each virtual stage: elements in the gradient buffers of dense parameters and of experts, each
    parameter starting at a multiple of ALIGNED. Experts have their own where `separate_experts`."""

    @property
    def dense(self) -> int:
        """What data and context parallelism share out to their optimizers."""
        return self.sharded + self.replicated

    @property
    def trained(self) -> int:
        return self.sharded + self.replicated + self.expert


def stage_contents(model: ModelConfig, layout: LayoutConfig) -> list[list[Contents]]:
    """For each pipeline rank its (virtual) stages in the data's order; the first dense_layers are dense."""
    counts = pipeline_stages(model.layers, layout)
    ranks: list[list[Contents]] = [[] for _ in range(layout.pp)]
    start = 0
    for index, count in enumerate(counts):
        dense = max(0, min(model.dense_layers - start, count))
        ranks[index % layout.pp].append(
            Contents(dense, count - dense, first=index == 0, last=index == len(counts) - 1)
        )
        start += count
    return ranks


def parameters(
    model: ModelConfig, contents: Iterable[Contents], *, tp: int = 1, ep: int = 1, etp: int = 1
) -> Parameters:
    """Parameters of one process that holds these stages."""
    contents = list(contents)
    dense = moe = 0
    first = last = False
    for stage in contents:
        dense, moe = dense + stage.dense, moe + stage.moe
        first, last = first or stage.first, last or stage.last
    layers, hidden = dense + moe, model.hidden_size
    vocabulary = model.vocab_size * hidden * (first + last - (model.tied_head and first and last))
    sharded = (
        layers * attention_weights(model)
        + dense * 3 * hidden * model.ffn_hidden_size
        + moe * 3 * hidden * model.shared_expert_hidden_size
        + vocabulary
    )
    norms = 2 * hidden + (2 * model.head_dim if model.qk_norm else 0)
    return Parameters(
        sharded=sharded // tp,
        replicated=layers * norms + moe * model.experts * hidden + last * hidden,
        expert=moe * model.experts * expert_weights(model) // (ep * etp),
        bias=moe * model.experts if model.expert_bias else 0,
        buffers=tuple(_buffers(model, stage, tp=tp, ep=ep, etp=etp) for stage in contents),
    )


def _buffers(model: ModelConfig, stage: Contents, *, tp: int, ep: int, etp: int) -> tuple[int, int]:
    """Elements of a stage's gradient buffers: dense parameters, and those of experts kept apart."""
    hidden, head = model.hidden_size, model.head_dim

    def aligned(*sizes: int) -> int:
        return sum(-(-size // ALIGNED) * ALIGNED for size in sizes)

    qkv, output = hidden * (model.heads + 2 * model.kv_heads) * head // tp, model.heads * head * hidden // tp
    attention = aligned(qkv, output, hidden, hidden) + (aligned(head, head) if model.qk_norm else 0)
    feed_forward, shared = (
        aligned(2 * hidden * width // tp, hidden * width // tp)
        for width in (model.ffn_hidden_size, model.shared_expert_hidden_size)
    )
    width = model.expert_hidden_size // etp
    experts = stage.moe * (model.experts // ep) * aligned(2 * hidden * width, hidden * width)
    tables = stage.first + stage.last - (model.tied_head and stage.first and stage.last)
    total = stage.layers * attention + stage.dense * feed_forward
    total += stage.moe * (shared + aligned(model.experts * hidden))
    total += tables * aligned(model.vocab_size * hidden // tp) + stage.last * aligned(hidden)
    return (total, experts) if separate_experts(ep, etp, tp) else (total + experts, 0)


def separate_experts(ep: int, etp: int, tp: int) -> bool:
    """Whether experts have gradient buffers and an optimizer of their own (megatron-core's layers.py)."""
    return ep > 1 or etp != tp


def total_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, expert_bias included, as checkpoints count them."""
    whole = parameters(model, *stage_contents(model, LayoutConfig()))
    return whole.trained + whole.bias


def checkpoint_bytes(model: ModelConfig, precision: PrecisionConfig) -> int:
    """Of a training checkpoint: weights, and the optimizer's fp32 masters and two moments."""
    return total_parameters(model) * ({"fp32": 4, "bf16": 2}[precision.dtype] + 12)


def attention_weights(model: ModelConfig) -> int:
    """Of one layer: queries, keys and values in one matrix, and the output projection."""
    qkv = model.hidden_size * (model.heads + 2 * model.kv_heads) * model.head_dim
    return qkv + model.heads * model.head_dim * model.hidden_size


def expert_weights(model: ModelConfig) -> int:
    """Of one routed expert."""
    return 3 * model.hidden_size * model.expert_hidden_size
