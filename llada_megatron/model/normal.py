"""Normal numbers as a function of (seed, name, index): the same on any device, in any order, in any shard."""

from __future__ import annotations

import hashlib
import math

import torch

ELEMENTS_PER_CALL = 1 << 21
"""Bounds the temporaries of the hash to a few tens of MB."""
NOISE = "embedding noise"


def counter_normal(index: torch.Tensor, seed: int, name: str) -> torch.Tensor:
    """Standard normals, float64, of the int64 `index`'s shape: Box-Muller over two hashes of each index."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    keys = [int.from_bytes(digest[at : at + 8], "little", signed=True) for at in (0, 8)]
    u1, u2 = (_uniform(_splitmix64(index + key)) for key in keys)
    return torch.sqrt(-2 * torch.log(u1)) * torch.cos(2 * math.pi * u2)


def noise_rows(seed: int, rows: int, width: int, device: torch.device) -> torch.Tensor:
    """Standard normals, fp32 [rows, width], as a function of the seed.

    torch's own generator on a CPU. On CUDA its numbers depend on how many multiprocessors the device has
    (aten/native/cuda/DistributionTemplates.h, calc_execution_policy), and a run may go on on another one.
    """
    if device.type == "cpu":
        return torch.randn(rows, width, generator=torch.Generator(device).manual_seed(seed), device=device)
    return hashed_rows(seed, rows, width, device)


def hashed_rows(seed: int, rows: int, width: int, device: torch.device) -> torch.Tensor:
    """What `noise_rows` gives on CUDA."""
    noise = torch.empty(rows * width, device=device)
    for first in range(0, len(noise), ELEMENTS_PER_CALL):
        part = noise[first : first + ELEMENTS_PER_CALL]
        part.copy_(counter_normal(torch.arange(first, first + len(part), device=device), seed, NOISE))
    return noise.view(rows, width)


def _splitmix64(x: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA'14); int64 arithmetic wraps as uint64 does."""

    def shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
        return (value >> bits) & ((1 << (64 - bits)) - 1)  # logical shift of a signed type

    x = x * -7046029254386353131  # 0x9E3779B97F4A7C15
    x = (x ^ shifted(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ shifted(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ shifted(x, 31)


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    """float64 in (0, 1) from the upper 53 bits."""
    return (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) / float(1 << 53)
