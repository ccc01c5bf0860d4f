"""Matrices in fp8 with a scale per block of 128 x 128, as DeepSeek-V3 publishes them (arXiv 2412.19437).

`NAME` holds e4m3 numbers [R, C] and `NAME_scale_inv` the factors [ceil(R / 128), ceil(C / 128)] by which the
numbers of a block are multiplied; blocks at the edges are smaller.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llada_megatron.config.errors import BadInput

BLOCK = 128
SCALE = "_scale_inv"
QUANTIZED = torch.float8_e4m3fn
KEYS = ("quantization_config", "compression_config")
"""Where a config.json says how the tensors beside it are quantised."""
OTHER_KINDS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale": "fp8 or int8 with one scale per matrix or row",
}
"""How names of tensors end that other ways of quantising leave."""


def scales_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Of the factors of a matrix [R, C]."""
    rows, columns = shape
    return -(-rows // BLOCK), -(-columns // BLOCK)


def dequantised(values: Tensor, scales: Tensor, first_row: int, dtype: torch.dtype) -> Tensor:
    """The numbers [r, C] of rows from `first_row` on: e4m3 [r, C] times fp32 scales of the whole matrix.

    The products are fp32 and are rounded to `dtype`. No more than 128 rows are held in fp32.
    """
    result = torch.empty(values.shape, dtype=dtype)
    column_blocks = torch.arange(values.shape[1]) // BLOCK
    for start in range(0, values.shape[0], BLOCK):
        rows = slice(start, min(start + BLOCK, values.shape[0]))
        row_blocks = (first_row + torch.arange(rows.start, rows.stop)) // BLOCK
        result[rows] = values[rows].float() * scales[row_blocks][:, column_blocks]
    return result


def require_served(described: dict[str, Any], quantised: bool, where: str) -> None:
    """Raise BadInput unless config.json says of fp8 tensors (`quantised`) what is done with them here.

    It may say nothing; what it says of tensors that are not quantised is nobody's.
    """
    said = described.get("quantization_config")
    if not quantised or said is None:
        return
    served = {"quant_method": ("fp8",), "fmt": ("e4m3", None), "weight_block_size": ([BLOCK, BLOCK],)}
    for key, values in served.items():
        found = said.get(key) if isinstance(said, dict) else said
        if found not in values:
            raise BadInput(
                f"{where} sets quantization_config.{key}={found!r}, and its tensors are fp8: only"
                f" {values[0]} is served."
            )


def without_quantization(described: dict[str, Any]) -> dict[str, Any]:
    """config.json of the same model when no tensor is quantised."""
    return {key: value for key, value in described.items() if key not in KEYS}
