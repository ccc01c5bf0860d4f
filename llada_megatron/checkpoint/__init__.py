"""Checkpoints over megatron-core's dist_checkpointing: published whole, refused when they do not fit."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()

from llada_megatron.runtime import unpickling  # noqa: E402  # imports torch's checkpoints, after the seam

unpickling.install()
