"""The `gpt` family: dense and MoE layers, as activations, transient, traffic and timing count them."""

from llada_megatron.plan.decoding_work import decoding_messages, decoding_work
from llada_megatron.plan.memory import units
from llada_megatron.plan.timing import seconds_of
from llada_megatron.plan.traffic import of_rank

__all__ = ["decoding_messages", "decoding_work", "of_rank", "seconds_of", "units"]
