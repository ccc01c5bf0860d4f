"""Block-wise decoding."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
