"""Attention is tested as training meets it: with the seam to megatron-core in place."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
