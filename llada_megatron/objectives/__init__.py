"""What a stage trains: its batches, the readout it asks for, its loss and its figures."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
