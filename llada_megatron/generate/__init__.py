"""Block-wise decoding: `Decoder`, and the rules that say what a forward changes."""

from llada_megatron.runtime import mcore_cpu

mcore_cpu.install()

from llada_megatron.generate.decoder import Decoder  # noqa: E402 - after the seam to megatron-core
from llada_megatron.generate.prompt import BlockChanged, Limits, Prompt, PromptRead, Result, Stop  # noqa: E402

__all__ = ["BlockChanged", "Decoder", "Limits", "Prompt", "PromptRead", "Result", "Stop"]
