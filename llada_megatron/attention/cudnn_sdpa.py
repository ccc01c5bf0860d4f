"""cuDNN's attention graphs in the two forms that `cudnn_graph` runs, by shape.

Built through the graph interface of nvidia-cudnn-frontend. Tensors are named as in cuDNN: q, k, v, o, their
gradients dq, dk, dv and do, and lse, which cuDNN calls stats.
"""

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llada_megatron.runtime import device as device_of


@dataclass(frozen=True)
class Geometry:
    """What a graph is compiled for; neither the documents nor the places of blocks belong to it."""

    ragged: bool
    """Sequences of up to `queries` rows and `keys` keys, nothing hidden; else an interval of keys per row."""
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    row_stride: int
    """Elements from one row of the query to the next."""
    key_stride: int
    dtype: torch.dtype
    device: torch.device
    scale: float
    deterministic: bool
    """In backward."""


class Graph:
    """A cuDNN graph whose tensors go by name; it is compiled at its first run."""

    def __init__(self, geometry: Geometry) -> None:
        import cudnn

        self.cudnn, self.geometry = cudnn, geometry
        types = {torch.bfloat16: cudnn.data_type.BFLOAT16, torch.float16: cudnn.data_type.HALF}
        self.io_type = types[geometry.dtype]
        self.graph = cudnn.pygraph(
            io_data_type=self.io_type,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=handle_of(geometry.device),
        )
        self.tensors: dict[str, Any] = {}
        self.workspace_bytes: int | None = None

    def operand(self, name: str) -> Any:
        """Declare q, k, v, o, do or lse as an input."""
        dim, stride, data_type, offsets = self._layout(name)
        tensor = self._declare(name, dim, stride, data_type)
        return tensor.set_ragged_offset(offsets) if offsets is not None else tensor

    def result(self, name: str, tensor: Any) -> None:
        """Declare o, lse, dq, dk or dv as an output."""
        dim, stride, data_type, offsets = self._layout(name)
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_data_type(data_type)
        if offsets is not None:
            tensor.set_ragged_offset(offsets)
        self.tensors[name] = tensor

    def visibility(self) -> dict[str, Any]:
        """The arguments of cuDNN's attention that say who sees whom."""
        geometry, int32 = self.geometry, self.cudnn.data_type.INT32
        if geometry.ragged:
            size = [geometry.batch, 1, 1, 1]
            rows, keys = (
                self._declare(name, size, [1, 1, 1, 1], int32) for name in ("row_lengths", "key_lengths")
            )
            return {"use_padding_mask": True, "seq_len_q": rows, "seq_len_kv": keys}
        rows = geometry.queries
        start, stop = (
            self._declare(name, [1, 1, rows, 1], [rows, rows, 1, 1], int32) for name in ("start", "stop")
        )
        hidden = self._declare("hidden", [1] * 4, [1] * 4, self.cudnn.data_type.FLOAT, is_pass_by_value=True)
        boolean = self.cudnn.data_type.BOOLEAN

        def score_mod(graph: Any, score: Any) -> Any:
            # The forms that backward accepts on sm_90: the vector as second operand, a choice for each bound
            # and no logical operation; the gradient of a hidden score is 0 without a modifier of its own.
            key = graph.gen_index(input=score, axis=3).set_data_type(int32)
            for compare, bound in ((graph.cmp_ge, start), (graph.cmp_lt, stop)):
                visible = compare(input=key, comparison=bound, compute_data_type=boolean)
                score = graph.binary_select(input0=score, input1=hidden, mask=visible.set_data_type(boolean))
            return score

        return {"score_mod": score_mod}

    def run(self, buffers: dict[str, Tensor]) -> None:
        """Run on the current stream, with a buffer for every tensor of the graph."""
        device = self.geometry.device
        handle = handle_of(device)
        self.cudnn.set_stream(handle=handle, stream=device_of.stream(device))
        if self.workspace_bytes is None:
            self.graph.build([self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK])
            self.workspace_bytes = self.graph.get_workspace_size()
        workspace = torch.empty(self.workspace_bytes, dtype=torch.uint8, device=device)
        by_tensor = {tensor: buffers[name] for name, tensor in self.tensors.items()}
        self.graph.execute(by_tensor, workspace, handle=handle)

    def _layout(self, name: str) -> tuple[list[int], list[int], Any, Any]:
        """Dimensions in cuDNN's order BHSD, strides, type, and the offsets of ragged sequences."""
        g = self.geometry
        if name == "lse":
            stride = (
                [g.heads * g.queries, 1, g.heads, 1] if g.ragged else [g.heads * g.queries, g.queries, 1, 1]
            )
            offsets = self._offsets("lse_offsets")
            return [g.batch, g.heads, g.queries, 1], stride, self.cudnn.data_type.FLOAT, offsets
        if name in ("k", "v", "dk", "dv"):
            heads, tokens, step, offsets = g.kv_heads, g.keys, g.key_stride, self._offsets("key_offsets")
        else:
            heads, tokens, step, offsets = g.heads, g.queries, g.row_stride, self._offsets("row_offsets")
        dim = [g.batch, heads, tokens, g.head_dim]
        return dim, [tokens * step, g.head_dim, step, 1], self.io_type, offsets

    def _offsets(self, name: str) -> Any:
        if not self.geometry.ragged:
            return None
        size = [self.geometry.batch + 1, 1, 1, 1]
        return self.tensors.get(name) or self._declare(name, size, [1] * 4, self.cudnn.data_type.INT64)

    def _declare(self, name: str, dim: list[int], stride: list[int], data_type: Any, **options: Any) -> Any:
        self.tensors[name] = self.graph.tensor(
            name=name, dim=dim, stride=stride, data_type=data_type, **options
        )
        return self.tensors[name]


@cache
def forward_graph(geometry: Geometry) -> Graph:
    """The graph from q, k, v to o and lse."""
    graph = Graph(geometry)
    q, k, v = map(graph.operand, ("q", "k", "v"))
    o, lse = graph.graph.sdpa(
        q=q, k=k, v=v, generate_stats=True, attn_scale=geometry.scale, **graph.visibility()
    )
    graph.result("o", o)
    graph.result("lse", lse)
    return graph


@cache
def backward_graph(geometry: Geometry) -> Graph:
    """The graph from q, k, v, o, do and lse to dq, dk and dv."""
    graph = Graph(geometry)
    q, k, v, o, do, lse = map(graph.operand, ("q", "k", "v", "o", "do", "lse"))
    gradients = graph.graph.sdpa_backward(
        q=q,
        k=k,
        v=v,
        o=o,
        dO=do,
        stats=lse,
        attn_scale=geometry.scale,
        use_deterministic_algorithm=geometry.deterministic,
        **graph.visibility(),
    )
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        graph.result(name, gradient)
    return graph


_handles = threading.local()


def handle_of(device: torch.device) -> Any:
    """cuDNN's handle for this thread: backward runs in another one, and they must not share it."""
    import cudnn

    handles = vars(_handles)
    if device not in handles:
        handles[device] = cudnn.create_handle()
    return handles[device]
