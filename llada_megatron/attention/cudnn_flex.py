"""Block-diffusion attention through `cudnn.flex_attention` of nvidia-cudnn-frontend, on Hopper and Blackwell.

Its kernels skip the tiles without a visible pair; the mask is O(S) endpoints. The package calls the interface
experimental. `make gpu-compile` compiles it without a GPU (docs/gpu.md).

Legend: Q queries, K keys, B batch, H heads, D head dim, Hkv key and value heads, S either of Q and K.
"""

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from llada_megatron.attention.intervals import endpoints_on
from llada_megatron.attention.mask import Rectangle
from llada_megatron.runtime import device as device_of

PACKAGE = "nvidia-cudnn-frontend"
OLDEST_VERSION = (1, 32)
ARCHITECTURES = ("sm_90", "sm_100", "sm_103")
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (*range(8, 129, 8), 256)

# Every layer of a model uses one rectangle within a micro-batch, so its plan is made once.
_plans: WeakKeyDictionary[Rectangle, dict[tuple[Any, ...], Any]] = WeakKeyDictionary()


def missing_requirement(
    device: torch.device, dtype: torch.dtype, head_dim: int, needs_backward: bool
) -> str | None:
    """Return what `cudnn_flex_attention` lacks to serve such tensors, or None when it can."""
    found = device_of.architecture(device)
    if found not in ARCHITECTURES:
        article = "an" if found.startswith("sm_") else "a"
        return f"needs an sm_90, sm_100 or sm_103 device, this is {article} {found}"
    installed = installed_version()
    if installed is None:
        return f"needs the package {PACKAGE}, which is not installed: pip install '.[cuda]'"
    if tuple(int(part) for part in installed.split(".")[:2]) < OLDEST_VERSION:
        return f"needs {PACKAGE} {'.'.join(map(str, OLDEST_VERSION))} or later, {installed} is installed"
    if dtype not in DTYPES:
        return f"serves bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"serves a head_dim of 256 or a multiple of 8 up to 128, not {head_dim}"
    return None


def cudnn_flex_attention(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> Tensor:
    """Return the attention output [Q, B, H, D]; query [Q, B, H, D], key and value [K, B, Hkv, D].

    The backward is deterministic when torch.use_deterministic_algorithms is on, which
    precision.deterministic decides.
    """
    return attention_and_lse(query, key, value, rectangle, softmax_scale)[0]


def attention_and_lse(
    query: Tensor, key: Tensor, value: Tensor, rectangle: Rectangle, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Return the output [Q, B, H, D] and the log-sum-exp of each row's scores, float32 [Q, B, H]."""
    from cudnn.flex_attention import flex_attn_func

    query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))  # [B, S, H, D]
    output, lse = flex_attn_func(
        query,
        key,
        value,
        mask_plan=_plan_of(rectangle, query, key, value),
        softmax_scale=softmax_scale,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        return_lse=True,
    )
    return _WithDenseGradient.apply(output).transpose(0, 1), lse.permute(2, 0, 1)


class _WithDenseGradient(torch.autograd.Function):
    """The identity, with a gradient whose last dimension is contiguous: that of a plain sum is expanded.

    The kernel refuses such a gradient and copies nothing by itself.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


def _plan_of(rectangle: Rectangle, query: Tensor, key: Tensor, value: Tensor) -> Any:
    """The package's plan for the rectangle: which tiles each query tile visits. All in [B, S, H, D]."""
    from cudnn.flex_attention import create_mask_plan

    name = query.device, query.dtype, query.size(2), key.size(2), query.size(3)
    plans = _plans.setdefault(rectangle, {})
    if name not in plans:
        ends = endpoints_on(rectangle, query.device)  # [B, F, Q]
        # One mask for all heads, [1, F, B Q]; a sample's endpoints count its own keys from 0.
        mask_func = ends.transpose(0, 1).flatten(1)[None].contiguous()
        # Recompute runs a layer without gradients first, and a plan reads a header back from the device: what
        # is no decoding gets one plan that serves both directions.
        plans[name] = create_mask_plan(mask_func, query, key, value, build_backward=not rectangle.few_rows)
    return plans[name]


@cache
def installed_version() -> str | None:
    """Return the version of the cuDNN frontend, or None."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None
