"""The seam: unmodified megatron-core on a machine without CUDA; a no-op where CUDA is there.

Every patch names the place in megatron-core 0.19.2 that needs it and is checked against the installed
source by `expect`, so that an upgrade fails at start-up instead of training wrongly. Two combinations
that compute wrong results without an error cannot be configured, since `model/families/gpt.py` decides both:
deallocated pipeline outputs on gloo (storage is freed while gloo still sends), and interleaved PP=2 with
batched p2p (two messages between one pair of ranks are swapped).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llada_megatron.runtime import quiet

SUPPORTED_VERSION = "0.19."
CPU = torch.device("cpu")


class _NoEvent:
    """CPU work is synchronous: recording and waiting have nothing to do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any, **kwargs: Any) -> None: ...
    def wait(self, *args: Any, **kwargs: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _NoEvent) -> float:
        return 0.0


class _NoStream:
    """The only stream of a CPU."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, *args: Any) -> _NoEvent:
        return _NoEvent()


def install() -> bool:
    """Make megatron-core importable and runnable on this CPU; returns whether the seam is active.

    Call it before anything imports megatron.core. Raises RuntimeError when megatron-core is not the
    version that was checked, or when a patched place no longer looks as expected.
    """
    quiet.install()
    if getattr(torch, "_llada_megatron_seam", False):
        return True
    if torch.cuda.is_available():
        _import_megatron(compiles=True)
        return False
    # tensor_parallel/layers.py:848: advice on the order of CUDA kernels.
    warnings.filterwarnings("ignore", ".*environment variable CUDA_DEVICE_MAX_CONNECTIONS", UserWarning)
    os.environ["TORCH_COMPILE_DISABLE"] = (
        "1"  # megatron/core/jit.py compiles small functions; needs a compiler
    )
    _patch_torch()
    core = _import_megatron(compiles=False)
    if not core.__version__.startswith(SUPPORTED_VERSION):
        raise RuntimeError(
            f"megatron-core {core.__version__} is installed, the CPU seam knows {SUPPORTED_VERSION}x:"
            " install the version of requirements.txt."
        )
    _patch_megatron()
    torch._llada_megatron_seam = True  # type: ignore[attr-defined]
    return True


def expect(module: str, *fragments: str) -> Any:
    """The module, after checking that its source still contains what a patch relies on."""
    loaded = importlib.import_module(module)
    with open(str(loaded.__file__), encoding="utf-8") as file:
        source = file.read()
    for fragment in fragments:
        if fragment not in source:
            raise RuntimeError(
                f"{module} no longer contains '{fragment}': what runtime/ changes in it must be reviewed"
                " for the version that is installed."
            )
    return loaded


def _import_megatron(*, compiles: bool) -> Any:
    """megatron.core without two imports that take half of its time on a CPU and that nothing here calls.

    timers.py imports wandb for a writer of its own, where wandb is installed. jit.py decorates with
    torch.compile, which loads the compiler although it may not compile here.
    """
    hidden = sys.modules.setdefault("wandb", None) is None  # type: ignore[arg-type]
    compile_ = torch.compile
    if not compiles:
        torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        expect("megatron.core.timers", "except ImportError:\n    wandb = None")
        expect("megatron.core.jit", "jit_fuser = torch.compile")
        return importlib.import_module("megatron.core")
    finally:
        torch.compile = compile_
        if hidden:
            del sys.modules["wandb"]


def _patch_torch() -> None:
    """torch.cuda names that megatron-core calls unconditionally."""
    cuda: Any = torch.cuda
    # transformer/moe/router.py:178 and many others: buffers are made on the current CUDA device.
    cuda.current_device = lambda: CPU
    cuda.set_device = lambda _device: None
    # models/common/embeddings/rope_utils.py, optimizer/grad_scaler.py: moves to "the" GPU.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[assignment,method-assign]
    torch.Tensor.record_stream = lambda self, *args: None  # type: ignore[assignment,method-assign]
    # pipeline_parallel/schedules.py:749, optimizer/optimizer.py, clip_grads.py: literal device="cuda";
    # dist_checkpointing/exchange_utils.py:103: empty_like.
    for name in ("zeros", "ones", "empty", "empty_like", "full", "tensor", "arange"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # optimizer/distrib_optimizer.py:466, optimizer.py:1028: Tensor.type() must be 'torch.cuda.FloatTensor'.
    tensor_type = torch.Tensor.type

    def type_as_cuda(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return str(tensor_type(self)).replace("torch.", "torch.cuda.", 1)
        return tensor_type(self, dtype, *args, **kwargs)

    torch.Tensor.type = type_as_cuda  # type: ignore[assignment,method-assign]
    # transformer/moe/token_dispatcher.py:469 makes a stream; p2p_communication.py synchronises.
    cuda.Stream, cuda.Event = _NoStream, _NoEvent
    stream = _NoStream()
    cuda.current_stream = cuda.default_stream = lambda *args, **kwargs: stream
    cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()
    cuda.synchronize = lambda *args, **kwargs: None
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *args, **kwargs: None
    cuda.is_current_stream_capturing = lambda: False
    # tensor_parallel/random.py: one generator here, the CPU's.
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return make


def _patch_megatron() -> None:
    random = expect(
        "megatron.core.tensor_parallel.random",
        "def _get_cuda_rng_state(",
        "def _set_cuda_rng_state(",
        "'CPU RNG state changed within GPU RNG context'",
        "share_storage = _get_share_storage()",
    )
    # tensor_parallel/random.py:73 compiles an extension that hands recomputed values to discarded tensors.
    random._get_share_storage = lambda: fill_storage
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(
        lambda record: "CPU RNG state changed" not in record.getMessage()
    )

    # moe_utils.py:1184: split sizes become numpy arrays only when they were on a GPU, but
    # token_dispatcher.py hands them to all_to_all_single either way.
    moe_utils = expect(
        "megatron.core.transformer.moe.moe_utils", "if torch.is_tensor(tensor) and tensor.is_cuda:"
    )
    dispatcher = expect(
        "megatron.core.transformer.moe.token_dispatcher",
        "self.input_splits = maybe_move_tensor_to_cpu(",
    )
    move = moe_utils.maybe_move_tensor_to_cpu

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if torch.is_tensor(tensor) and not tensor.is_cuda:
            return tensor.numpy() if as_numpy else tensor
        return move(tensor, as_numpy, record_stream)

    moe_utils.maybe_move_tensor_to_cpu = dispatcher.maybe_move_tensor_to_cpu = move_to_cpu

    # tensor_parallel/mappings.py gathers and scatters uneven splits (EP with ETP); gloo wants even ones.
    expect(
        "megatron.core.tensor_parallel.mappings", "torch.distributed.reduce_scatter(", "output_split_sizes"
    )
    dist.all_gather = _uneven_all_gather(dist.all_gather)
    dist.reduce_scatter = _uneven_reduce_scatter(dist.reduce_scatter)


def fill_storage(discarded: torch.Tensor, recomputed: torch.Tensor) -> None:
    """Give a tensor whose storage was emptied the values that were computed again: as a copy."""
    storage, source = discarded.untyped_storage(), recomputed.untyped_storage()
    storage.resize_(source.nbytes())
    storage.copy_(source)


def _uneven_all_gather(even: Callable[..., Any]) -> Callable[..., Any]:
    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if len({part.shape for part in tensor_list}) <= 1:
            return even(tensor_list, tensor, group=group, async_op=async_op)
        group = group or dist.group.WORLD
        tensor_list[group.rank()].copy_(tensor)
        for rank, part in enumerate(tensor_list):
            buffer = part.contiguous()
            dist.broadcast(buffer, group_src=rank, group=group)
            part.copy_(buffer)
        return None

    return all_gather


def _uneven_reduce_scatter(even: Callable[..., Any]) -> Callable[..., Any]:
    def reduce_scatter(
        output: torch.Tensor,
        input_list: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.shape for part in input_list}) <= 1:
            return even(output, input_list, op=op, group=group, async_op=async_op)
        group = group or dist.group.WORLD
        flat = torch.cat([part.reshape(-1) for part in input_list])
        dist.all_reduce(flat, op=op, group=group)
        sizes = [part.numel() for part in input_list]
        output.copy_(flat.split(sizes)[group.rank()].view_as(output))
        return None

    return reduce_scatter
