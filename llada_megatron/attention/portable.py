"""Block-diffusion attention for any device and dtype, in memory proportional to the length.

A query's keys are computed in a few tiles (tiles.py) by a kernel that also returns the log-sum-exp of the
scores (kernels.py). By it the results over different keys merge exactly, and given the merged output and
log-sum-exp the backward pass of every tile is exact too.

Legend: B batch, H heads, Hkv key and value heads, G = H / Hkv, D head dim, Q queries and K keys of a
rectangle, T tiles of a call, m rows or keys of a tile. Tiles index rows [R, G, N, D] and keys [K', 1, N, D].
Samples that are alike become heads (R = Q, K' = K, N = B * Hkv), others become rows (R = B * Q, K' = B * K,
N = Hkv). The G query heads of a key head become rows of a tile, so that keys are not copied for them.
"""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from llada_megatron.attention.kernels import kernel_for
from llada_megatron.attention.mask import Rectangle
from llada_megatron.attention.tiles import Booleans, Integers, Stage, TileCall, tiling


def portable_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> Tensor:
    """Return the attention output [Q, B, H, Dv].

    query [Q, B, H, D]; key [K, B, Hkv, D]; value [K, B, Hkv, Dv]. Results and gradients are added up in
    float32 or wider.
    """
    plan = _plan_of(rectangle, query, group=query.size(2) // key.size(2))
    return _TiledAttention.apply(query, key, value, plan, softmax_scale)


class Index:
    """Places [T, m] in the first dimension of tensors; evenly spaced ones are read and written in place."""

    def __init__(self, places: Integers, padding: Booleans | None, group: int, device: torch.device) -> None:
        self.tiles, self.length = places.shape
        self.start = int(places[0, 0])
        self.step = int(places[-1, 0] - self.start) // max(1, self.tiles - 1)
        even = self.start + self.step * np.arange(self.tiles)[:, None] + np.arange(self.length)
        self.is_view = self.step >= 0 and bool((places == even).all())
        self.places = torch.from_numpy(places.ravel()).to(device)
        self.is_padding: Tensor | None = None
        if padding is not None:
            # [T, 1, m * G]
            self.is_padding = torch.from_numpy(padding.repeat(group, axis=1)).to(device)[:, None]
            self.real = torch.from_numpy(np.flatnonzero(~padding)).to(device)
            self.real_places = self.places[self.real]

    def take(self, tensor: Tensor) -> Tensor:
        """Return [T, N, m * G, ...] of tensor [R, G, N, ...]."""
        if self.is_view:
            return self._view(tensor)
        rows = tensor.index_select(0, self.places)
        return rows.view(self.tiles, -1, *tensor.shape[2:]).transpose(1, 2)

    def put(self, tensor: Tensor, source: Tensor) -> None:
        """Write source [T, N, m * G, ...] to tensor [R, G, N, ...], but for its padding."""
        if self.is_view:
            self._view(tensor).copy_(source)
        elif self.is_padding is None:
            tensor.index_copy_(0, self.places, self._rows_of(source, tensor))
        else:
            tensor.index_copy_(0, self.real_places, self._rows_of(source, tensor).index_select(0, self.real))

    def add(self, tensor: Tensor, source: Tensor) -> None:
        """Add source [T, N, m * G, ...], zero where it is padding, to tensor [R, G, N, ...]."""
        if self.is_view:
            self._view(tensor).add_(source)
        else:
            tensor.index_add_(0, self.places, self._rows_of(source, tensor))

    def _view(self, tensor: Tensor) -> Tensor:
        row, _, head, *inner = tensor.stride()
        _, group, heads, *rest = tensor.shape
        shape = self.tiles, heads, self.length * group, *rest
        strides = self.step * row, head, row // group, *inner
        return tensor.as_strided(shape, strides, tensor.storage_offset() + self.start * row)

    def _rows_of(self, source: Tensor, tensor: Tensor) -> Tensor:
        return source.to(tensor.dtype).transpose(1, 2).reshape(-1, *tensor.shape[1:])


@dataclass(frozen=True, eq=False)
class Call:
    """Tiles that one kernel call computes."""

    rows: Index
    keys: Index
    bias: Tensor | None
    """[T or 1, 1, m * G or 1, keys], 0 where visible."""
    begins: bool
    """Nothing was computed for its rows before."""


@dataclass(frozen=True, eq=False)
class Part:
    """A Segment as tensors."""

    order: Tensor | None
    """[rows of the part]; None where it is all rows as they are."""
    calls: list[Call]
    covered: bool
    """Every row is in a call that begins it."""


@dataclass(frozen=True, eq=False)
class Plan:
    """A Tiling as tensors, for one device, dtype and group."""

    shared: bool
    halves: int
    noisy_keys: int
    group: int
    parts: list[Part]
    """The segments, then the stages of rows as given, which the segments have covered where there are any."""

    def rows(self, tensor: Tensor) -> Tensor:
        """[Q, B, H, D] -> [R, G, N, D]."""
        Q, B, H, D = tensor.shape
        heads = H // self.group
        if self.shared:
            tensor = tensor.reshape(Q, B, heads, self.group, D).permute(0, 3, 1, 2, 4)
            return tensor.reshape(Q, self.group, B * heads, D).contiguous()
        tensor = tensor.reshape(self.halves, -1, B, heads, self.group, D).permute(0, 2, 1, 4, 3, 5)
        return tensor.reshape(Q * B, self.group, heads, D).contiguous()

    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """[R, G, N, D] -> [Q, B, H, D]."""
        Q, B, H, D = shape
        heads = H // self.group
        if self.shared:
            return rows.view(Q, self.group, B, heads, D).permute(0, 2, 3, 1, 4).reshape(shape)
        return rows.view(self.halves, B, -1, self.group, heads, D).permute(0, 2, 1, 4, 3, 5).reshape(shape)

    def keys(self, tensor: Tensor) -> Tensor:
        """[K, B, Hkv, D] -> [K, 1, N, D]."""
        K, B, heads, D = tensor.shape
        if self.shared:
            return tensor.reshape(K, 1, B * heads, D).contiguous()
        noisy, clean = tensor[: self.noisy_keys], tensor[self.noisy_keys :]
        return torch.cat([half.transpose(0, 1).reshape(-1, 1, heads, D) for half in (noisy, clean)])

    def from_keys(self, keys: Tensor, shape: torch.Size) -> Tensor:
        """[K, 1, N, D] -> [K, B, Hkv, D]."""
        K, B, heads, D = shape
        if self.shared:
            return keys.view(shape)
        noisy, clean = keys.split([self.noisy_keys * B, (K - self.noisy_keys) * B])
        return torch.cat([half.view(B, -1, heads, D).transpose(0, 1) for half in (noisy, clean)])


# Every layer of a model uses the same rectangle within a micro-batch, so its plan is made once.
_plans: WeakKeyDictionary[Rectangle, dict[tuple[torch.device, torch.dtype, int], Plan]] = WeakKeyDictionary()


def _plan_of(rectangle: Rectangle, query: Tensor, group: int) -> Plan:
    plans = _plans.setdefault(rectangle, {})
    name = query.device, query.dtype, group
    if name not in plans:
        plans[name] = _plan(rectangle, *name)
    return plans[name]


def _plan(rectangle: Rectangle, device: torch.device, dtype: torch.dtype, group: int) -> Plan:
    tiled = tiling(rectangle)

    def part(order: Integers | None, rows: int, stages: list[Stage], begun: bool = False) -> Part:
        first, *_ = [*stages, []]
        calls = [
            _call(call, stage is first and not begun, device, dtype, group)
            for stage in stages
            for call in stage
        ]
        covered = begun or sum(call.queries for call in first) == rows
        return Part(None if order is None else torch.from_numpy(order).to(device), calls, covered)

    parts = []
    for segment in tiled.segments:
        is_everything = len(segment.order) == tiled.rows and bool((np.diff(segment.order) == 1).all())
        parts.append(part(None if is_everything else segment.order, len(segment.order), segment.stages))
    parts.append(part(None, tiled.rows, tiled.stages, begun=bool(parts)))
    return Plan(
        shared=tiled.shared,
        halves=2 if rectangle.mask.clean_copy else 1,
        noisy_keys=rectangle.noisy_keys.shape[1],
        group=group,
        parts=parts,
    )


def _call(call: TileCall, begins: bool, device: torch.device, dtype: torch.dtype, group: int) -> Call:
    bias = None
    if call.visible is not None:
        visible = call.visible if call.visible.shape[1] == 1 else call.visible.repeat(group, axis=1)
        bias = torch.from_numpy(np.where(visible, 0.0, _hidden(dtype))).to(device, dtype)[:, None]
    rows = Index(call.rows, call.padding, group, device)
    return Call(rows, Index(call.keys, None, 1, device), bias, begins)


def _hidden(dtype: torch.dtype) -> float:
    """A finite stand-in for -inf: the weight of a row that sees nothing is exactly 0, -inf would give NaN."""
    return torch.finfo(dtype).min / 2


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, softmax_scale: float
    ) -> Tensor:
        kernel = kernel_for(query.device)
        rows, keys, values = plan.rows(query), plan.keys(key), plan.keys(value)
        wide = torch.promote_types(query.dtype, torch.float32)

        def compute(part: Part, rows: Tensor, output: Tensor, lse: Tensor) -> None:
            if not part.covered:
                output.zero_()
                lse.fill_(_hidden(wide))
            for call in part.calls:
                tiles = call.rows.take(rows), call.keys.take(keys), call.keys.take(values)
                tile_output, tile_lse = kernel.forward(*tiles, call.bias, softmax_scale)
                if call.begins:
                    call.rows.put(output, tile_output)
                    call.rows.put(lse, tile_lse)
                else:
                    _merge(output, lse, call.rows, tile_output, tile_lse)

        output = rows.new_empty(*rows.shape[:3], value.size(3), dtype=wide)
        lse = output.new_empty(rows.shape[:3])
        for part in plan.parts:
            if part.order is None:
                compute(part, rows, output, lse)
            else:
                results = [torch.empty_like(whole[: len(part.order)]) for whole in (output, lse)]
                compute(part, rows.index_select(0, part.order), *results)
                output.index_copy_(0, part.order, results[0])
                lse.index_copy_(0, part.order, results[1])
        output = plan.from_rows(output.to(query.dtype), torch.Size([*query.shape[:3], value.size(3)]))
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.plan, ctx.softmax_scale = plan, softmax_scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse = ctx.saved_tensors
        plan: Plan = ctx.plan
        kernel = kernel_for(query.device)
        keys, values = plan.keys(key), plan.keys(value)
        # Dozens of tiles share a key: too many terms to add up in bfloat16.
        grad_keys, grad_values = (torch.zeros_like(each, dtype=lse.dtype) for each in (keys, values))

        def compute(part: Part, grad_rows: Tensor, *inputs: Tensor) -> None:
            if not part.covered:
                grad_rows.zero_()
            for call in part.calls:
                rows, out, tile_lse, grad = (call.rows.take(tensor) for tensor in inputs)
                if call.rows.is_padding is not None:
                    tile_lse = tile_lse.masked_fill(call.rows.is_padding, torch.inf)  # it contributes nothing
                tiles = grad, rows, call.keys.take(keys), call.keys.take(values), out, tile_lse
                gradients = kernel.backward(*tiles, call.bias, ctx.softmax_scale)
                (call.rows.put if call.begins else call.rows.add)(grad_rows, gradients[0])
                call.keys.add(grad_keys, gradients[1])
                call.keys.add(grad_values, gradients[2])

        inputs = plan.rows(query), plan.rows(output), lse, plan.rows(grad_output)
        grad_rows = torch.empty_like(inputs[0], dtype=lse.dtype)
        for part in plan.parts:
            if part.order is None:
                compute(part, grad_rows, *inputs)
            else:
                result = torch.empty_like(grad_rows[: len(part.order)])
                compute(part, result, *(tensor.index_select(0, part.order) for tensor in inputs))
                grad_rows.index_copy_(0, part.order, result)
        grad_query = plan.from_rows(grad_rows.to(query.dtype), query.shape)
        grad_key, grad_value = (
            plan.from_keys(grad.to(tensor.dtype), tensor.shape)
            for grad, tensor in ((grad_keys, key), (grad_values, value))
        )
        return grad_query, grad_key, grad_value, None, None


def _merge(output: Tensor, lse: Tensor, rows: Index, tile_output: Tensor, tile_lse: Tensor) -> None:
    """Merge attention over the keys of tiles into that over other keys, in place."""
    before, lse_before = rows.take(output), rows.take(lse)
    weight = torch.sigmoid(tile_lse - lse_before)
    before.lerp_(tile_output.to(before.dtype), weight[..., None])
    if not rows.is_view:
        rows.put(output, before)
    rows.put(lse, torch.logaddexp(tile_lse, lse_before))
