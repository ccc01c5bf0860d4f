"""The families of Hugging Face checkpoints that are served: a file each, and a place in SERVED."""

from __future__ import annotations

from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.convert.families import bailing, deepseek, llada, llama, qwen
from llada_megatron.convert.families.family import ExpertLayout, Family

__all__ = ["FAMILIES", "SERVED", "ExpertLayout", "Family", "family_of"]

SERVED = (
    *(bailing.FAMILY, llama.FAMILY, qwen.QWEN2, qwen.QWEN3, qwen.QWEN3_MOE),
    *(llada.FAMILY, llada.MOE, deepseek.FAMILY),
)
"""A model that came from elsewhere leaves as the first one that can hold it."""
FAMILIES = {architecture: family for family in SERVED for architecture in family.architectures}


def family_of(architecture: str, where: Any) -> Family:
    """The family of an architecture; BadInput naming those that are served."""
    if architecture not in FAMILIES:
        raise BadInput(
            f"{where} is of architecture {architecture}, which is not served: {', '.join(FAMILIES)} are."
        )
    return FAMILIES[architecture]
