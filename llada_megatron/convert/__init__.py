"""Hugging Face checkpoints in and out: one table for both directions, streamed, with a certificate."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
