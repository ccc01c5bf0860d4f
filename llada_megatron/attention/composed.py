"""Block-diffusion attention composed of plain `scaled_dot_product_attention` calls.

Runs on any device and in any floating-point dtype, and autograd differentiates it. A plan cuts the queries
of a sequence into short chunks and gives each chunk the spans of keys that its rows may see, with a small
mask where the rows differ: the work is close to the visible pairs, and no tensor of size S x S exists.

Legend: S sequence, B batch, H heads, D head dim, Hkv key and value heads, L data tokens per sequence,
q queries of a call, k keys of a call.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llada_megatron.attention.mask import BlockDiffusionMask, KeySpans, Rectangle

# Short blocks share a call of up to max(MIN_CHUNK_TOKENS, L / MAX_CHUNKS) queries; a longer block is a call
# of its own. Measured forward and backward on one CPU core, float32, one document, 4 to 8 heads, head dim
# 16 to 64: for L 256 to 1024 chunks of 64 are the fastest or within 12% of it at every block size (32 is up
# to 25% slower from call overhead, 256 up to 65% from hidden pairs); at L = 2048 chunks of 128 are as good.
# Against one dense masked call that is 1.4 to 2.5 times faster at L = 256, 2.1 to 3.1 times at L = 1024.
# The second bound keeps memory linear: each noisy chunk holds a copy of the clean keys before it.
MIN_CHUNK_TOKENS = 64
MAX_CHUNKS = 16

Span = tuple[int, int]  # positions [start, stop)
PerToken = npt.NDArray[np.int64]  # [L]


@dataclass(frozen=True)
class Call:
    """One attention call: its queries, its keys, and a mask for the pairs among them that are hidden."""

    query: Span
    keys: list[Span]
    bias: Tensor | None  # [q, k], 0 where visible, -inf where hidden; None when nothing is hidden
    is_causal: bool  # the lower triangle is visible, and bias is None

    @property
    def query_tokens(self) -> int:
        return self.query[1] - self.query[0]

    @property
    def pairs(self) -> int:
        n = self.query_tokens
        return n * (n + 1) // 2 if self.is_causal else n * sum(stop - start for start, stop in self.keys)


Plan = list[Call]  # the queries tile [0, S) in order

# Every layer of a model uses the same mask object within a micro-batch, so its plans are made once.
_plans: WeakKeyDictionary[Rectangle, dict[tuple[torch.device, torch.dtype], list[Plan]]]
_plans = WeakKeyDictionary()


def composed_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> Tensor:
    """Return the attention output [Q, B, H, D] without ever holding Q x K elements.

    query [Q, B, H, D]; key, value [K, B, Hkv, D], not copied for grouped queries.
    """
    plans = _plans_of(rectangle, query.device, query.dtype)
    samples_per_plan = rectangle.batch // len(plans)
    parts = (tensor.permute(1, 2, 0, 3).split(samples_per_plan) for tensor in (query, key, value))
    outputs = [_run(plan, q, k, v, softmax_scale) for plan, q, k, v in zip(plans, *parts, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


def performed_pairs(mask: BlockDiffusionMask) -> int:
    """Return the query-key pairs that this executor computes for the micro-batch, hidden ones included.

    A causal call counts its triangle: how a kernel rounds it to tiles is not counted.
    """
    plans = _plans_of(mask.whole(), torch.device("cpu"), torch.float32)
    return mask.batch // len(plans) * sum(call.pairs for plan in plans for call in plan)


def _run(plan: Plan, query: Tensor, key: Tensor, value: Tensor, softmax_scale: float) -> Tensor:
    """Attend with query [B, H, S, D] and key, value [B, Hkv, S, D]; returns [S, B, H, D]."""
    queries = query.split([call.query_tokens for call in plan], dim=2)
    spans = [call.keys for call in plan]
    keys, values = _TakeSpans.apply(key, spans), _TakeSpans.apply(value, spans)
    outputs = [
        scaled_dot_product_attention(
            call_query,
            call_key,
            call_value,
            attn_mask=call.bias,
            is_causal=call.is_causal,
            scale=softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        ).permute(2, 0, 1, 3)  # [q, B, H, D]
        for call, call_query, call_key, call_value in zip(plan, queries, keys, values, strict=True)
    ]
    return torch.cat(outputs)


class _TakeSpans(torch.autograd.Function):
    """Cut [B, Hkv, S, D] into the keys of each call, with a backward that adds them up in one buffer.

    A plain slice pads its gradient to all S positions, once per call: that cost as much as the attention.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, spans_per_call: list[list[Span]]) -> tuple[Tensor, ...]:
        ctx.spans_per_call, ctx.shape = spans_per_call, tensor.shape
        pieces = ([tensor[:, :, start:stop] for start, stop in spans] for spans in spans_per_call)
        return tuple(piece[0] if len(piece) == 1 else torch.cat(piece, dim=2) for piece in pieces)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        dtype = gradients[0].dtype
        # Dozens of calls share a key: too many terms to add up in bfloat16.
        total = gradients[0].new_zeros(ctx.shape, dtype=torch.promote_types(dtype, torch.float32))
        for gradient, spans in zip(gradients, ctx.spans_per_call, strict=True):
            pieces = gradient.split([stop - start for start, stop in spans], dim=2)
            for piece, (start, stop) in zip(pieces, spans, strict=True):
                total[:, :, start:stop] += piece
        return total.to(dtype), None


def _plans_of(rectangle: Rectangle, device: torch.device, dtype: torch.dtype) -> list[Plan]:
    """Return one plan for all samples where their documents are the same, else one plan per sample."""
    plans = _plans.setdefault(rectangle, {})
    if (device, dtype) not in plans:
        arrays = rectangle.mask.document_start, rectangle.tokens, rectangle.noisy_keys
        shared = all((array == array[0]).all() for array in arrays)
        samples = range(1 if shared else rectangle.batch)
        plans[device, dtype] = [_plan(rectangle, sample, device, dtype) for sample in samples]
    return plans[device, dtype]


# Making a plan. Documents and blocks are runs of neighbouring tokens, so the keys that a query sees in one
# half are a span whose edges rise with the query.


@dataclass(frozen=True)
class KeyRange:
    """Keys [start, stop) of each row; both rise with the row."""

    start: PerToken
    stop: PerToken

    @property
    def span(self) -> Span:
        """Keys that any row sees."""
        return int(self.start[0]), int(self.stop[-1])

    @property
    def is_uniform(self) -> bool:
        return bool(self.start[0] == self.start[-1] and self.stop[0] == self.stop[-1])

    def rows(self, start: int, stop: int) -> "KeyRange":
        return KeyRange(self.start[start:stop], self.stop[start:stop])

    def hidden(self) -> npt.NDArray[np.bool_]:
        """Return [rows, keys of span], True where a row does not see a key."""
        key = np.arange(*self.span)
        return (key < self.start[:, None]) | (key >= self.stop[:, None])


@dataclass(frozen=True)
class Chunk:
    """A call before its mask is a tensor."""

    query: Span
    ranges: list[KeyRange]

    @property
    def keys(self) -> list[Span]:
        return [r.span for r in self.ranges]

    @property
    def key_tokens(self) -> int:
        return sum(stop - start for start, stop in self.keys)

    @property
    def is_causal(self) -> bool:
        """Whether row i sees exactly the first i + 1 keys."""
        first = self.ranges[0]
        triangle = first.start[0] + np.arange(len(first.stop)) + 1
        one_start = first.start[0] == first.start[-1]
        return bool(len(self.ranges) == 1 and one_start and np.array_equal(first.stop, triangle))

    @property
    def needs_bias(self) -> bool:
        return not self.is_causal and not all(r.is_uniform for r in self.ranges)

    def hidden(self) -> npt.NDArray[np.bool_]:
        return np.concatenate([r.hidden() for r in self.ranges], axis=1)  # [q, k]


def _plan(rectangle: Rectangle, sample: int, device: torch.device, dtype: torch.dtype) -> Plan:
    mask = rectangle.mask

    def keys(spans: KeySpans) -> KeyRange:
        return KeyRange(spans.start[sample], spans.stop[sample])

    clean_so_far = keys(rectangle.past_and_block)
    # Blocks of one token make a document a causal triangle, which needs neither a mask nor chunks.
    causal_run = clean_so_far.start if mask.block_size == 1 else clean_so_far.stop
    n = rectangle.tokens.shape[1]
    if mask.clean_copy:
        chunks = _chunks(0, clean_so_far.stop, [keys(rectangle.past), keys(rectangle.own_block)])
        chunks += _chunks(n, causal_run, [clean_so_far])
    elif mask.causal:
        chunks = _chunks(0, causal_run, [clean_so_far])
    else:
        document = keys(rectangle.document)
        chunks = _chunks(0, document.start, [document])
    biases = _biases(chunks, device, dtype)
    return [Call(c.query, c.keys, bias, c.is_causal) for c, bias in zip(chunks, biases, strict=True)]


def _chunks(first_row: int, run: PerToken, ranges: list[KeyRange]) -> list[Chunk]:
    """Cut rows into chunks of whole runs (equal values: blocks or documents): a long one, or short ones."""
    chunk_tokens = max(MIN_CHUNK_TOKENS, len(run) // MAX_CHUNKS)
    run_stops = [*(np.flatnonzero(np.diff(run)) + 1).tolist(), len(run)]
    chunks, start = [], 0
    for index, stop in enumerate(run_stops):
        if index + 1 < len(run_stops) and run_stops[index + 1] <= start + chunk_tokens:
            continue
        rows = [r.rows(start, stop) for r in ranges]
        seen = [r for r in rows if r.span[0] < r.span[1]]
        chunks.append(Chunk((first_row + start, first_row + stop), seen))
        start = stop
    return chunks


def _biases(chunks: list[Chunk], device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """Return each chunk's additive mask [q, k], the form that kernels need no conversion for.

    Chunks repeat one pattern behind an ever longer visible prefix: only the widest of each is stored.
    """
    widest: dict[tuple[tuple[int, ...], bytes], Tensor] = {}
    biases: list[Tensor | None] = [None] * len(chunks)
    masked = [index for index, chunk in enumerate(chunks) if chunk.needs_bias]
    for index in sorted(masked, key=lambda i: chunks[i].key_tokens, reverse=True):
        hidden = chunks[index].hidden()
        pattern = hidden[:, hidden.any(axis=0).argmax() :]  # without the prefix that all rows see
        name = pattern.shape, pattern.tobytes()
        if name not in widest:
            widest[name] = torch.tensor(np.where(hidden, -np.inf, 0.0), dtype=dtype, device=device)
        biases[index] = widest[name][:, -hidden.shape[1] :]
    return biases
