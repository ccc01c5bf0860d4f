"""What a dry run replaces: one rank of any world, in one process, without data, messages or memory.

Inside `world` this process is a rank of a layout whose other ranks do not exist, and inside `contracts`
kernels keep for backward what fused ones keep on a GPU. Everything is put back on leaving; training never
enters either. A place of megatron-core 0.19.2 that is gone fails here; one that changed shows in the
comparison with the closed form (tests/dryrun/test_rank.py).

Tensors hold no values under torch's FakeTensorMode, so whatever depends on values is given one:

    numbers that the host reads back      1
    which experts a token takes           as many tokens for each expert as for any other
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeStore
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import param_and_grad_buffer  # noqa: E402
from megatron.core.fusions import fused_bias_swiglu  # noqa: E402
from megatron.core.pipeline_parallel import combined_1f1b, schedules  # noqa: E402
from megatron.core.pipeline_parallel.utils import ScheduleNode  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402
from megatron.core.tensor_parallel import random as parallel_random  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.moe import moe_utils, token_dispatcher  # noqa: E402
from megatron.core.transformer.moe.token_dispatcher import (  # noqa: E402
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
)

Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]


@contextmanager
def world(rank: int, processes: int) -> Iterator[None]:
    """Be `rank` of `processes`: groups exist, messages go nowhere."""
    with ExitStack() as undo:
        _swap(undo, parallel_state, "create_group", _own_groups(rank))
        _swap(undo, dist, "all_gather_object", _everyone_says_the_same)
        dist.init_process_group("fake", rank=rank, world_size=processes, store=FakeStore())
        yield


@dataclass(frozen=True, slots=True)
class Watch:
    """What to wrap around the parts of a step."""

    micro_batch: Wrapper
    """A forward, and a forward beside another one's backward or a backward alone (layout.overlap_experts)."""
    forward: Wrapper
    backward: Wrapper
    gradients: Wrapper
    weights: Wrapper
    """What buffers send once per step."""
    resized: Callable[[torch.UntypedStorage], None]
    """Told of storages that got another size, which no operation tells."""


@contextmanager
def watched(by: Watch) -> Iterator[None]:
    """Wrap what megatron-core's schedules call per micro-batch, and what its buffers send once per step."""
    buffers = param_and_grad_buffer._ParamAndGradBucketGroup
    resize = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        resize(storage, size)
        by.resized(storage)
        return storage

    with ExitStack() as undo:
        for owner, name, wrapper in (
            (schedules, "forward_step", by.forward),
            (schedules, "forward_step", by.micro_batch),
            (schedules, "backward_step", by.backward),
            (ScheduleNode, "_forward", by.forward),
            (ScheduleNode, "_backward", by.backward),
            (combined_1f1b, "combined_forward_backward_step", by.micro_batch),
            (buffers, "start_grad_sync", by.gradients),
            (buffers, "start_param_sync", by.weights),
        ):
            _swap(undo, owner, name, wrapper(getattr(owner, name)))
        _swap(undo, torch.UntypedStorage, "resize_", resize_)
        yield


@contextmanager
def contracts() -> Iterator[None]:
    """Fused kernels' contracts, balanced experts, and no generator states: what a dry run of a step needs."""
    with ExitStack() as undo:
        _swap(undo, torch.nn.RMSNorm, "forward", lambda norm, x: _FusedRMSNorm.apply(x, norm.weight))
        _swap(undo, torch.nn.Module, "_apply", _apply_to_real_ones(torch.nn.Module._apply))
        for name in ("get_rng_state", "set_rng_state"):
            _swap(undo, torch, name, lambda *state: None)  # recompute saves and restores it
        _swap(undo, parallel_random, "_get_share_storage", lambda: _hand_storage_over)
        _swap(undo, CudaRNGStatesTracker, "fork", lambda tracker, name=None: nullcontext())
        _swap(undo, torch.Tensor, "type", _type_of_fakes(torch.Tensor.type))
        _swap(undo, torch, "tensor", _stacking_fakes(torch.tensor))
        preprocess = MoEAlltoAllTokenDispatcher.preprocess
        _swap(undo, MoEAlltoAllTokenDispatcher, "preprocess", _balanced(preprocess))
        initialize = MoEAlltoAllTokenDispatcher.__init__
        _swap(undo, MoEAlltoAllTokenDispatcher, "__init__", _orders_on_host(initialize))
        gathered = MoEAllGatherTokenDispatcher.dispatch_postprocess
        _swap(undo, MoEAllGatherTokenDispatcher, "dispatch_postprocess", _balanced_gathered(gathered))
        for name, fused in _FUSED_SWIGLU.items():
            _swap(undo, fused_bias_swiglu, name, fused)
        yield


def _swap(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _own_groups(rank: int) -> Callable[..., Any]:
    """Only groups with this rank: a large world has thousands of others."""
    create = parallel_state.create_group

    def create_group(ranks: Any = None, *args: Any, **options: Any) -> Any:
        if ranks is not None and rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return create(ranks, *args, **(options | {"backend": None, "pg_options": None}))

    return create_group


def _everyone_says_the_same(said: list[Any], mine: Any, group: Any = None) -> None:
    said[:] = [mine] * len(said)


def _hand_storage_over(discarded: torch.Tensor, recomputed: torch.Tensor) -> None:
    """One storage for both, as on a device; the second keeps none, since its values are not read again."""
    size = recomputed.untyped_storage().nbytes()
    recomputed.untyped_storage().resize_(0)
    discarded.untyped_storage().resize_(size)


def _apply_to_real_ones(apply: Callable[..., Any]) -> Callable[..., Any]:
    """nn.Module._apply swaps fake parameters, which fails; here none has another device or dtype to go to."""

    def _apply(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
        if any(isinstance(parameter, FakeTensor) for parameter in module.parameters()):
            return module
        return apply(module, function, recurse)

    return _apply


def _type_of_fakes(type_of: Callable[..., Any]) -> Callable[..., Any]:
    names = {torch.float32: "Float", torch.bfloat16: "BFloat16"}

    def tensor_type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **options: Any) -> Any:
        if dtype is None and isinstance(tensor, FakeTensor):
            return f"torch.cuda.{names[tensor.dtype]}Tensor"
        return type_of(tensor, dtype, *args, **options)

    return tensor_type


def _stacking_fakes(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """For megatron-core/utils.py, local_multi_tensor_l2_norm: torch.tensor of norms reads their values."""

    def tensor(data: Any, *args: Any, **options: Any) -> torch.Tensor:
        if isinstance(data, list) and isinstance((leaves := tree_leaves(data) or [None])[0], FakeTensor):
            return torch.stack(leaves)
        return make(data, *args, **options)

    return tensor


# Experts


def balanced_map(tokens: int, experts: int, per_token: int) -> torch.Tensor:
    """bool [tokens, experts]: each token at `per_token` experts, each expert with as many tokens."""
    chosen = (np.arange(tokens)[:, None] * per_token + np.arange(per_token)) % experts
    routing_map = np.zeros((tokens, experts), dtype=bool)
    np.put_along_axis(routing_map, chosen, True, axis=1)
    return torch.from_numpy(routing_map)


def _balanced(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """token_dispatcher.py, preprocess: real counts of a balanced map; the host then splits by them."""

    def balanced(dispatcher: Any, routing_map: torch.Tensor) -> Any:
        counts = routing_map.sum(dim=0).long()
        gather_from_sequence_parallel_region(
            counts, group=dispatcher.tp_ep_group
        )  # for the record of messages
        with _disable_current_modes():
            tokens, experts = routing_map.shape
            real = balanced_map(tokens, experts, dispatcher.config.moe_router_topk)
            tokens_per_expert = preprocess(dispatcher, real)
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                _to_numpy(dispatcher, name)
            _to_numpy(dispatcher, "num_global_tokens_per_local_expert")
            return tokens_per_expert.numpy()

    return balanced


def _balanced_gathered(postprocess: Callable[..., Any]) -> Callable[..., Any]:
    """token_dispatcher.py, dispatch_postprocess of gathered tokens: counts of a balanced map likewise."""

    def balanced(dispatcher: Any, hidden: torch.Tensor, probabilities: torch.Tensor) -> Any:
        with _disable_current_modes():
            tokens, experts = dispatcher.routing_map.shape
            chosen = balanced_map(tokens, experts, dispatcher.router_topk)
            per_expert = chosen[:, dispatcher.local_expert_indices].sum(dim=0)
            copies = int(per_expert.sum())

        def permute(*args: Any, num_out_tokens: int, **options: Any) -> Any:
            return moe_utils.permute(*args, num_out_tokens=copies, **options)

        with ExitStack() as undo:
            _swap(undo, token_dispatcher, "permute", permute)
            _swap(undo, torch.Tensor, "masked_select", lambda x, mask: _Selected.apply(x, mask, copies))
            hidden, _, probabilities = postprocess(dispatcher, hidden, probabilities)
        return hidden, per_expert, probabilities

    return balanced


class _Selected(torch.autograd.Function):
    """masked_select of so many elements: it keeps its input and the mask."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, size: int) -> torch.Tensor:
        ctx.save_for_backward(x, mask)
        return x.new_zeros(size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return torch.zeros_like(ctx.saved_tensors[0]), None, None


def _to_numpy(dispatcher: Any, name: str) -> None:
    value = getattr(dispatcher, name, None)
    if isinstance(value, torch.Tensor):
        setattr(dispatcher, name, value.numpy())


def _orders_on_host(initialize: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(dispatcher: Any, *args: Any, **options: Any) -> None:
        with _disable_current_modes():
            initialize(dispatcher, *args, **options)
            for name in ("sort_input_by_local_experts", "restore_output_by_local_experts"):
                _to_numpy(dispatcher, name)

    return __init__


# Kernels


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps its input and 1/rms in fp32 per row, as aten's kernel for CUDA does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, torch.zeros(x.shape[:-1], dtype=torch.float32))
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.zeros_like(x), torch.zeros_like(weight)


class _FusedAttention(torch.autograd.Function):
    """Keeps its inputs, its output and an fp32 log-sum-exp per row and head, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = torch.zeros((*query.shape[:3], value.shape[3]), dtype=query.dtype)
        ctx.save_for_backward(query, key, value, out, torch.zeros(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(t.shape, dtype=t.dtype) for t in ctx.saved_tensors[:3])


def fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rectangle: Any, scale: float
) -> torch.Tensor:
    """An executor of attention that keeps what a fused kernel keeps, and computes nothing."""
    return _FusedAttention.apply(query, key, value)


def _gated(y: torch.Tensor, *unused: Any) -> torch.Tensor:
    return torch.zeros((*y.shape[:-1], y.shape[-1] // 2), dtype=y.dtype)


_FUSED_SWIGLU: dict[
    str, Callable[..., Any]
] = {  # megatron-core compiles these; a kernel makes its outputs alone
    "swiglu": _gated,
    "weighted_swiglu": _gated,
    "swiglu_back": lambda grad, y: torch.zeros(y.shape, dtype=y.dtype),
    "weighted_swiglu_back": lambda grad, y, weights: (
        torch.zeros(y.shape, dtype=y.dtype),
        torch.zeros(weights.shape, dtype=weights.dtype),
    ),
}
