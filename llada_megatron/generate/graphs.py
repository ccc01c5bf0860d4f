"""CUDA graphs of the forwards within a block, where a sequence adds no keys but those of its active block.

Such a forward is some thousand small kernels, which a host starts more slowly than a device runs them. A
graph starts them at once. It reads and writes the same memory each time, so whatever changes lies in tensors
that are filled before: tokens and how much of each is read, positions, the rows that the head is applied
to, the places of keys, and where each sequence's rows and keys end. A graph serves any batch of as many rows
whose keys fit its room, in this block and in later ones. Forwards that also read a prompt or a block that has
just been done run without one.

Legend: S rows, N rows that the head is applied to, K keys, C figures per row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor

from llada_megatron.attention import varlen
from llada_megatron.attention.keys import PooledKeys
from llada_megatron.config.errors import BadInput
from llada_megatron.model.core_attention import BlockDiffusionCoreAttention
from llada_megatron.model.experts import Experts, keep_on_device
from llada_megatron.model.inputs import ModelInputs
from llada_megatron.runtime import device

SMALLEST_ROOM = 256
MOST_ROWS = 512
"""Of a graph: with more rows kernels take longer than their start."""
GROUPED = ("sm_90", "sm_100", "sm_103")
"""Where torch's grouped_mm reads on the device how many rows each expert has (GroupedBlas.cpp)."""

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""`device.capture`, or what stands in for it without a device."""


def graphs_of(model: torch.nn.Module) -> Graphs:
    """The graphs of a model that is only decoded from now on; BadInput, saying why, where it has none."""
    missing = missing_requirement(model, device.device())
    if missing:
        raise BadInput(f"CUDA graphs (--cuda-graphs) {missing}.")
    keep_on_device(model)
    # The head computes more rows than that in chunks, with states of generators in between.
    return Graphs(model, most_rows=min(MOST_ROWS, get_attr_wrapped_model(model, "head_chunk_tokens")))


def missing_requirement(model: torch.nn.Module, at: torch.device) -> str | None:
    """What a model on a device lacks for graphs, as a phrase, or None."""
    architecture = device.architecture(at)
    if at.type != "cuda":
        return f"need a CUDA device, this is a {architecture}: leave them out"
    if any(parameter.requires_grad for parameter in model.parameters()):
        return "serve a model that is only decoded, and this one learns: freeze its parameters"
    for module in model.modules():
        if isinstance(module, BlockDiffusionCoreAttention):
            if str(module.backend) not in ("auto", "varlen"):
                return f"need model.attention_backend=auto or varlen, not {module.backend}"
            if module.config.multi_latent_attention:
                return "serve no latents (model.mla), wider than what varlen serves: leave them out"
            dtype = next(model.parameters()).dtype
            missing = varlen.missing_requirement(at, dtype, module.config.kv_channels, False)
            if missing:
                return f"need attention by varlen, which {missing}"
        if isinstance(module, MoELayer):
            missing = _missing_for_experts(module, architecture)
            if missing:
                return missing
    return None


def _missing_for_experts(layer: Any, architecture: str) -> str | None:
    for axis, ranks in (
        ("ep", parallel_state.get_expert_model_parallel_world_size()),
        ("etp", parallel_state.get_expert_tensor_parallel_world_size()),
    ):
        if ranks > 1:
            return (
                f"need all experts on each rank, since how many tokens travel is read on the host: set"
                f" layout.{axis}=1"
            )
    if not isinstance(layer.experts, Experts):
        return "need experts of the local layers: set model.layer_spec=local"
    if layer.router.expert_capacity:
        return "serve no pools of experts (model.expert_capacity), whose blocks are worked out on the host"
    if layer.experts.has_adapters:
        return "serve no adapters at experts: merge them (llada convert mcore-to-hf) and decode that folder"
    if architecture not in GROUPED:
        return f"need sm_90, sm_100 or sm_103 for experts, this is an {architecture}: leave them out"
    if next(layer.experts.parameters()).dtype is not torch.bfloat16:
        return "need bfloat16 for experts: set precision.dtype=bf16"
    return None


class Graphs:
    """Called as the model is; takes the graph for as many rows and keys, or makes it."""

    def __init__(
        self, model: torch.nn.Module, capture: Capture = device.capture, most_rows: int = MOST_ROWS
    ) -> None:
        self.model, self.capture, self.most_rows = model, capture, most_rows
        self.captured = self.replayed = 0
        self._steps: dict[tuple[Any, ...], _Step] = {}

    def __call__(self, inputs: ModelInputs) -> Tensor:
        """What the head says of the chosen rows, [N, C]."""
        keys = inputs.keys
        assert isinstance(keys, PooledKeys)
        first, *others = varlen.calls_of(keys.rectangle, inputs.tokens.device)
        S = inputs.tokens.shape[1]
        if others or self.most_rows < S or inputs.labels is not None:
            return self.model(inputs)
        room, sequences = room_for(keys.rectangle.keys), len(first.row_edges)
        form = S, room, sequences, first.longest, inputs.readout.name, inputs.soft is not None
        if form not in self._steps:
            self._steps[form] = _Step(self.model, inputs, room, self.capture)
            self.captured += 1
        self.replayed += 1
        return self._steps[form](inputs)


def room_for(keys: int) -> int:
    """More than `keys`, by at most a quarter where they are many: numbers of keys that share a graph."""
    step = max(SMALLEST_ROOM, 1 << max(0, keys.bit_length() - 3))
    return (keys // step + 1) * step


class _Step:
    """One graph, and the tensors that it reads."""

    def __init__(self, model: torch.nn.Module, inputs: ModelInputs, room: int, capture: Capture) -> None:
        assert isinstance(inputs.keys, PooledKeys)
        self._keys = SteadyKeys(inputs.keys, room, inputs.tokens.device)
        soft = inputs.soft
        self._held = replace(
            inputs,
            tokens=inputs.tokens.clone(),
            positions=inputs.positions.clone(),
            outputs=torch.zeros_like(inputs.tokens[0]),
            keys=self._keys,
            soft=None if soft is None else replace(soft, weights=soft.weights.clone()),
        )
        self._of: PooledKeys | None = None
        self._fill(inputs)
        self._output, self._replay = capture(lambda: model(self._held))

    def __call__(self, inputs: ModelInputs) -> Tensor:
        self._fill(inputs)
        self._replay()
        return self._output[: len(inputs.outputs)]

    def _fill(self, inputs: ModelInputs) -> None:
        self._held.tokens.copy_(inputs.tokens)
        if self._held.soft is not None and inputs.soft is not None:
            self._held.soft.weights.copy_(inputs.soft.weights)
        self._held.outputs[: len(inputs.outputs)] = inputs.outputs  # behind them, rows that nobody asked for
        if self._of is not inputs.keys:
            assert isinstance(inputs.keys, PooledKeys)
            self._held.positions.copy_(inputs.positions)
            self._keys.fill(inputs.keys)
            self._of = inputs.keys


class SteadyKeys:
    """The keys of a batch, in tensors that those of another one can take the place of.

    Keys are gathered from the pool, always `room` of them; those behind the last sequence are of no row here.
    """

    def __init__(self, keys: PooledKeys, room: int, at: torch.device) -> None:
        ends = keys.mask.cu_seqlens[0]
        self.mask = replace(keys.mask, cu_seqlens=[torch.cat([ends, ends.new_tensor([room])])])
        self.rectangle = replace(keys.rectangle, mask=self.mask)
        self.pool = keys.pool
        self._row_places = torch.zeros(self.rectangle.queries, dtype=torch.int64, device=at)
        self._key_places = torch.zeros(room, dtype=torch.int64, device=at)
        (self._call,) = varlen.calls_of(self.rectangle, at)

    def fill(self, keys: PooledKeys) -> None:
        """Be those of another batch with as many rows, whose keys fit the room."""
        places = keys.places
        self._row_places.copy_(torch.from_numpy(places[keys.rectangle.tokens[0]]))
        self._key_places[: len(places)] = torch.from_numpy(places).to(self._key_places.device)
        (call,) = varlen.calls_of(keys.rectangle, self._key_places.device)
        self._call.copy_(call)

    def of(self, key: Tensor, value: Tensor, layer: int, group: Any) -> tuple[Tensor, Tensor]:
        """All keys and values of the sequences, those of the rows at hand among them; [room, 1, Hkv, *]."""
        # For other widths attention takes an executor whose plan is made once, on the host.
        assert key.size(-1) == value.size(-1)
        kept_key, kept_value = self.pool.of_layer(layer, key, value)
        kept_key.index_copy_(0, self._row_places, key[:, 0])
        kept_value.index_copy_(0, self._row_places, value[:, 0])
        found_key, found_value = (
            kept.index_select(0, self._key_places)[:, None] for kept in (kept_key, kept_value)
        )
        return found_key, found_value

    def to(self, at: torch.device) -> SteadyKeys:
        """These keys, which lie where they were made."""
        return self
