"""The `gpt` family: dense and MoE layers, as activations, transient, traffic and timing count them."""

from llada_megatron.config.schema import ModelConfig
from llada_megatron.plan.decoding_work import decoding_messages, decoding_work
from llada_megatron.plan.memory import units
from llada_megatron.plan.timing import seconds_of
from llada_megatron.plan.traffic import of_rank

__all__ = [
    "assumed_of_shapes",
    "assumed_of_times",
    "decoding_messages",
    "decoding_work",
    "of_rank",
    "seconds_of",
    "units",
]


def assumed_of_shapes(model: ModelConfig) -> list[str]:
    """Nothing: its rows are the tokens."""
    return []


def assumed_of_times(model: ModelConfig) -> list[str]:
    """Nothing beside what holds for all families."""
    return []
