"""Attention over `[x_t ; x_0]`: the block-diffusion mask and the executors that apply it."""

from llada_megatron.attention.mask import BlockDiffusionMask, Rectangle
from llada_megatron.attention.registry import block_diffusion_attention, select_backend

__all__ = ["BlockDiffusionMask", "Rectangle", "block_diffusion_attention", "select_backend"]
