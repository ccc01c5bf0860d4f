"""What a model is worth: the likelihood bound and the exact NLL, baselines of the text, samples."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()
