"""Block-diffusion attention through cuDNN's attention graphs, for stacks without `cudnn.flex_attention`.

The two calls of two_call.py: a graph with one interval of keys per row as its score modifier, and one over
ragged sequences. cuDNN's graphs take at most two loaded vectors per row in backward on sm_90, which one
interval is and the whole mask is not. Every pair of a row and a clean key is computed, hidden or not: of one
document about twice the visible pairs, of packed documents many times as many.

`make gpu-compile` has cuDNN accept the operation graphs without a GPU (docs/gpu.md).

Legend: Q queries, B batch, H heads, Hkv key and value heads, D head dim, L clean keys, N blocks, T rows and U
keys of the own-block call.
"""

import torch
from torch import Tensor

from llada_megatron.attention import cudnn_flex
from llada_megatron.attention.cudnn_sdpa import Geometry, backward_graph, forward_graph
from llada_megatron.attention.mask import Rectangle
from llada_megatron.attention.two_call import (
    HIDDEN_SCORE,
    Gradients,
    Interval,
    OwnBlocks,
    TwoCalls,
    two_call_attention,
)
from llada_megatron.runtime import device as device_of

# The oldest that the graphs were tried with. cuDNN has no backward of head_dim 192 for an interval on sm_100,
# and its deterministic one does not compile there.
OLDEST_FRONTEND = (1, 20)
OLDEST_CUDNN = 92400
ARCHITECTURES = ("sm_90", "sm_100")
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 96, 128, 256)


def missing_requirement(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_backward: bool
) -> str | None:
    """Return what `cudnn_graph_attention` lacks to serve such tensors, or None when it can."""
    found = device_of.architecture(device)
    if found not in ARCHITECTURES:
        article = "an" if found.startswith("sm_") else "a"
        return f"needs an sm_90 or sm_100 device, this is {article} {found}"
    installed, cudnn = cudnn_flex.installed_version(), torch.backends.cudnn.version()
    if installed is None:
        return f"needs the package {cudnn_flex.PACKAGE}, which is not installed: pip install '.[cuda]'"
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_FRONTEND:
        oldest = ".".join(map(str, OLDEST_FRONTEND))
        return f"needs {cudnn_flex.PACKAGE} {oldest} or later, {installed} is installed"
    if cudnn is None or cudnn < OLDEST_CUDNN:
        return (
            f"needs cuDNN {_dotted(OLDEST_CUDNN)} or later, torch has {_dotted(cudnn) if cudnn else 'none'}"
        )
    if dtype not in DTYPES:
        return f"serves bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"serves a head_dim of 64, 96, 128 or 256, not {head_dim}"
    if needs_backward and found != "sm_90" and torch.are_deterministic_algorithms_enabled():
        return f"has no deterministic backward on {found}: set precision.deterministic=false"
    return None


def cudnn_graph_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> Tensor:
    """Return the attention output [Q, B, H, D]; query [Q, B, H, D], key and value [K, B, Hkv, D].

    The backward is deterministic when torch.use_deterministic_algorithms is on, which
    precision.deterministic decides; cuDNN then takes a workspace of gigabytes for long sequences.
    """
    return two_call_attention(
        query, key, value, rectangle, softmax_scale, TwoCalls(IntervalCall(), OwnBlockCall())
    )


class IntervalCall:
    """Samples run one by one: their intervals differ."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: Interval, scale: float
    ) -> tuple[Tensor, Tensor]:
        graph = forward_graph(_interval_geometry(query, key, scale))
        out = torch.empty_like(query)
        lse = query.new_empty(query.size(1), query.size(2), query.size(0), dtype=torch.float32)
        for sample in range(query.size(1)):
            tensors = {"q": query, "k": key, "v": value, "o": out}
            of_sample = {name: tensor[:, sample] for name, tensor in tensors.items()}
            graph.run(of_sample | {"lse": lse[sample]} | _ends(seen, sample))
        return out, lse.permute(2, 0, 1)

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        seen: Interval,
        scale: float,
    ) -> Gradients:
        graph = backward_graph(_interval_geometry(query, key, scale))
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        tensors = {"q": query, "k": key, "v": value, "o": out, "do": grad_out} | _named(gradients)
        lse = lse.permute(1, 2, 0).contiguous()  # [B, H, Q]
        for sample in range(query.size(1)):
            of_sample = {name: tensor[:, sample] for name, tensor in tensors.items()}
            graph.run(of_sample | {"lse": lse[sample]} | _ends(seen, sample))
        return gradients


class OwnBlockCall:
    """Blocks are ragged sequences, those of all samples in one run."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, seen: OwnBlocks, scale: float
    ) -> tuple[Tensor, Tensor]:
        graph = forward_graph(_own_block_geometry(query, key, seen, scale))
        out, lse = torch.empty_like(query), query.new_empty(query.shape[:2], dtype=torch.float32)
        tensors = {"q": query, "k": key, "v": value, "o": out, "lse": lse}
        graph.run(tensors | _places(query, key, seen))
        return out, lse

    def backward(
        self,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        seen: OwnBlocks,
        scale: float,
    ) -> Gradients:
        graph = backward_graph(_own_block_geometry(query, key, seen, scale))
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        tensors = {"q": query, "k": key, "v": value, "o": out, "do": grad_out, "lse": lse}
        graph.run(tensors | _named(gradients) | _places(query, key, seen))
        return gradients


def _interval_geometry(query: Tensor, key: Tensor, scale: float) -> Geometry:
    return _geometry(query[:, 0], key[:, 0], scale, False, 1, query.size(0), key.size(0))


def _own_block_geometry(query: Tensor, key: Tensor, blocks: OwnBlocks, scale: float) -> Geometry:
    return _geometry(query, key, scale, True, len(blocks.row_edges) - 1, blocks.longest, blocks.most_keys)


def _geometry(
    query: Tensor, key: Tensor, scale: float, ragged: bool, batch: int, queries: int, keys: int
) -> Geometry:
    """query [rows, H, D], key [keys, Hkv, D], both dense in the last two dimensions."""
    return Geometry(
        ragged=ragged,
        batch=batch,
        queries=queries,
        keys=keys,
        heads=query.size(1),
        kv_heads=key.size(1),
        head_dim=query.size(2),
        row_stride=query.stride(0),
        key_stride=key.stride(0),
        dtype=query.dtype,
        device=query.device,
        scale=scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _named(gradients: Gradients) -> dict[str, Tensor]:
    return dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def _ends(seen: Interval, sample: int) -> dict[str, Tensor]:
    return {"start": seen.start[sample], "stop": seen.stop[sample], "hidden": torch.tensor(HIDDEN_SCORE)}


def _places(query: Tensor, key: Tensor, blocks: OwnBlocks) -> dict[str, Tensor]:
    """Lengths of the sequences in tokens, and where they begin in elements."""
    first_row, first_key = blocks.row_edges.long(), blocks.key_edges.long()
    return {
        "row_lengths": blocks.row_edges.diff(),
        "key_lengths": blocks.key_edges.diff(),
        "row_offsets": first_row * query.stride(0),
        "key_offsets": first_key * key.stride(0),
        "lse_offsets": first_row * query.size(1),
    }


def _dotted(version: int) -> str:
    """9.24 of 92400."""
    return f"{version // 10000}.{version // 100 % 100}"
