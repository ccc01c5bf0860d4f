"""Text to token files, and token files to packed sequences in one global order."""

from llada_megatron.runtime import quiet

quiet.install()  # before the first import of megatron.core
