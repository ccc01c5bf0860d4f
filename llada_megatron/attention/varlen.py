"""Attention of the few rows that decoding reads, through FlashAttention over sequences of unequal length.

Without a clean copy a row sees one range of keys: those of its sequence up to the end of its block. So the
rows of a block are an entry of `torch.nn.attention.varlen`, which sees all its keys and needs no mask.
Nothing is compiled, and nothing is planned but the ends of the entries.

Two entries of a call share no keys: the first call has the first block of rows of each sequence, the next
one the second. That is one call for active blocks, two where a block has just been done, one for each block
of a prompt that is read, and one for each row of a shadow (keys.py). Keys that no entry sees belong to one
without rows.

Legend: Q queries, K keys, B batch, H heads, Hkv key and value heads, D head dim, T rows of a call, E entries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from llada_megatron.attention.mask import Rectangle
from llada_megatron.config.errors import BadInput
from llada_megatron.runtime import device as device_of

OLDEST_ARCHITECTURE = 80
DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD_DIM = 256
PADDING = 32
"""The number of entries is padded to a multiple of this with empty ones, so that it takes few values."""


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the kernel."""

    rows: Tensor | None
    """int64 [T]; None where it is all rows as they are."""
    row_edges: Tensor
    """int32 [E + 1]: the first row of each entry, and the end."""
    key_edges: Tensor
    """int32 [E + 1], in [0, B K]; keys behind the last one belong to no entry."""
    longest: int
    """No entry has more rows: a power of two, so that it takes few values."""
    keys: int
    """No entry has more keys."""

    def copy_(self, other: "Call") -> None:
        """Become a call over all rows with as many entries, in place: for whoever reads the same tensors
        again, as a CUDA graph does.
        """
        assert self.rows is None and other.rows is None and other.longest <= self.longest
        self.row_edges.copy_(other.row_edges)
        self.key_edges.copy_(other.key_edges)


Kernel = Callable[[Tensor, Tensor, Tensor, Call, float], Tensor]
"""Of query [T, H, D], key and value [B K, Hkv, D], the call and the scale: the output [T, H, D]."""

# Every layer of a model uses one rectangle within a forward, so its calls are worked out once.
_calls: WeakKeyDictionary[Rectangle, dict[torch.device, list[Call]]] = WeakKeyDictionary()


def missing_requirement(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_backward: bool
) -> str | None:
    """Return what `varlen_attention` lacks to serve such tensors, or None when it can."""
    if needs_backward:
        return "serves decoding alone, without a backward"
    found = device_of.architecture(device)
    if device.type != "cuda" or int(found.removeprefix("sm_")) < OLDEST_ARCHITECTURE:
        article = "an" if found.startswith("sm_") else "a"
        return f"needs a device of sm_{OLDEST_ARCHITECTURE} or later, this is {article} {found}"
    if dtype not in DTYPES:
        return f"serves bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return f"serves a head_dim that is a multiple of 8 up to {LARGEST_HEAD_DIM}, not {head_dim}"
    return None


def flash_attention(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> Tensor:
    """Return the output [T, H, D] of torch's kernel.

    `num_splits=1`: otherwise the order of sums depends on the longest sequence of the batch, and a sequence's
    tokens on its neighbours. It also keeps torch from taking cuDNN, which was not tried with empty entries.
    """
    from torch.nn.attention.varlen import varlen_attn

    edges = call.row_edges, call.key_edges
    is_grouped = query.size(1) != key.size(1)
    most = call.longest, call.keys
    return varlen_attn(query, key, value, *edges, *most, scale=scale, enable_gqa=is_grouped, num_splits=1)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rectangle: Rectangle,
    softmax_scale: float,
    kernel: Kernel = flash_attention,
) -> Tensor:
    """Return the attention output [Q, B, H, D]; query [Q, B, H, D], key and value [K, B, Hkv, D].

    Raises BadInput for a mask with a clean copy, whose rows see two ranges of keys.
    """
    rows, keys, values = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
    calls = calls_of(rectangle, query.device)
    if calls[0].rows is None:
        output = kernel(rows, keys, values, calls[0], softmax_scale)
    else:
        output = torch.empty_like(rows)
        for call in calls:
            part = kernel(rows.index_select(0, call.rows), keys, values, call, softmax_scale)
            output.index_copy_(0, call.rows, part)
    return output.unflatten(0, (rectangle.batch, -1)).transpose(0, 1)


def calls_of(rectangle: Rectangle, device: torch.device) -> list[Call]:
    """The calls that a rectangle takes, with tensors on the device; kept with it."""
    calls = _calls.setdefault(rectangle, {})
    if device not in calls:
        calls[device] = _calls_of(rectangle, device)
    return calls[device]


def _calls_of(rectangle: Rectangle, device: torch.device) -> list[Call]:
    if rectangle.mask.clean_copy:
        raise BadInput(
            "model.attention_backend=varlen serves decoding alone, not [x_t ; x_0]; auto takes one that can"
            " serve"
        )
    seen = rectangle.past_and_block if rectangle.mask.causal else rectangle.document
    samples = rectangle.keys * np.arange(rectangle.batch)[:, None]
    start, stop = ((edges + samples).ravel() for edges in (seen.start, seen.stop))
    first_row = np.flatnonzero(np.diff(stop, prepend=-1))  # of each entry
    rows = np.diff(first_row, append=len(stop))
    start, stop = start[first_row], stop[first_row]
    first_entry = np.flatnonzero(start >= np.append(0, stop[:-1]))  # of each sequence
    entries = np.diff(first_entry, append=len(start))
    number = np.arange(len(start)) - np.repeat(first_entry, entries)
    calls = number.max() + 1
    return [
        _call(
            None if calls == 1 else np.flatnonzero(np.repeat(number, rows) == each),
            *(of_entries[number == each] for of_entries in (rows, start, stop)),
            keys=rectangle.batch * rectangle.keys,
            device=device,
        )
        for each in range(calls)
    ]


def _call(
    indices: np.ndarray | None,
    rows: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
    *,
    keys: int,
    device: torch.device,
) -> Call:
    ends = rows.cumsum()
    edges = (np.stack(pair, axis=1).ravel() for pair in ((ends - rows, ends), (start, stop)))
    padding = 1, -2 * len(rows) % PADDING
    row_edges, key_edges = (
        # Before the first edge lie the keys that it begins with; behind the last one empty entries.
        torch.from_numpy(np.pad(each, padding, mode="constant", constant_values=(0, each[-1]))).to(
            device, torch.int32
        )
        for each in edges
    )
    return Call(
        None if indices is None else torch.from_numpy(indices).to(device),
        row_edges,
        key_edges,
        # For one row an entry the kernel takes another way, on which every entry has one.
        max(16, 1 << int(rows.max() - 1).bit_length()),
        keys,
    )
