"""The step, the loop, the optimizer, where a run starts."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
