"""Architectures as data, layer specs, and the provider that builds megatron-core models from them."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
