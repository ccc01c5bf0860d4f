"""The step, the loop, evaluation, the optimizer."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
