"""Closed-form FLOPs of a training step, and their share of what the devices can do; without torch.

The loop's MFU and the plan's are this one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from llada_megatron.config.errors import BadInput
from llada_megatron.config.families import formulas_of
from llada_megatron.config.last_layer import needed_rows_per_token
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import ClusterConfig, Config, ModelConfig
from llada_megatron.config.stage_settings import diffusion_of

PEAK_SETTING = {"bf16": "peak_tflops", "fp32": "peak_tflops_fp32"}
"""The key of `cluster` with the peak of a dtype."""


@dataclass(frozen=True)
class DocumentLengths:
    """Log-normal lengths of packed documents: half are shorter than `median_tokens`."""

    median_tokens: float
    sigma: float = 1.0
    """Standard deviation of the logarithm of a length."""

    def __str__(self) -> str:
        return f"{self.median_tokens:.0f},{self.sigma:.2f}"

    @classmethod
    def parse(cls, text: str) -> DocumentLengths:
        """From `MEDIAN` or `MEDIAN,SIGMA`; raises BadInput for anything else."""
        try:
            lengths = cls(*(float(word) for word in text.split(",")))
        except (TypeError, ValueError):
            lengths = cls(0.0)
        if not (1 <= lengths.median_tokens <= 1e12 and 0 < lengths.sigma < 10):
            raise BadInput(
                f"Document lengths {text!r}: give MEDIAN,SIGMA, for example 665,1.0 (tokens, and the standard"
                " deviation of their logarithm; `llada data inspect` shows both)."
            )
        return lengths

    def same_document(self, distance: int) -> float:
        """Probability that two tokens this far apart in a long stream lie in one document.

        E[max(X - d, 0)] / E[X] of a length X: a stationary renewal process. For a log-normal X both terms are
        those of Black and Scholes' call.
        """
        if distance == 0:
            return 1.0
        high = (math.log(self.median_tokens / distance) + self.sigma**2) / self.sigma
        mean = self.median_tokens * math.exp(self.sigma**2 / 2)
        return _normal(high) - distance / mean * _normal(high - self.sigma)


def _normal(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


def training_flops_per_sequence(
    model: ModelConfig,
    *,
    positions: int,
    pairs: float,
    supervised: float,
    head_recomputed: bool = False,
    last_positions: int | None = None,
    before: bool = False,
) -> float:
    """Forward and backward FLOPs of one sequence, without recompute of the layers.

    positions: tokens that pass the layers (2L with a clean copy, else L); pairs: query-key pairs of one
    attention layer; supervised: positions that pass the head; last_positions: those that pass what lies
    behind the last layer's attention, all unless given. A weight costs 2 FLOPs forward and 4 backward per
    token (2 where it is frozen beside an adapter), a pair twice as much backward as forward. Adapters, which
    are small, are counted for all positions. before: of what a pass before a step's own runs through.
    """
    formulas, has_adapters = formulas_of(model), model.lora.rank > 0
    per_weight = 4 if has_adapters else 6  # a frozen matrix has no gradient of its own
    active, per_pair = (
        formulas.before(model) if before else (formulas.active_weights(model), formulas.pair_flops(model))
    )
    weights = per_weight * sum(active.values())
    matrices = (weights + 6 * formulas.active_adapters(model)) * positions
    ended = 0 if last_positions is None else positions - last_positions
    matrices -= per_weight * sum(formulas.last_layer_weights(model).values()) * ended
    attention = 3 * per_pair * pairs
    per_head = per_weight + (2 if head_recomputed else 0)
    head = per_head * model.hidden_size * model.vocab_size * supervised
    return matrices + attention + head


def expected_pairs(
    sequence_length: int,
    block_size: int,
    *,
    clean_copy: bool,
    causal: bool,
    documents: DocumentLengths | None = None,
) -> float:
    """Visible pairs of one layer for a sequence: of one document, or on average of packed ones.

    Of n ordered pairs inside documents and m inside both a document and a block, block-causal attention sees
    (n + m)/2. A clean copy has own noisy blocks m, earlier clean blocks (n - m)/2, and (n + m)/2: n + m
    together. For one document n = L^2 and m = L*block. Blocks are those of the sequence; a grid that starts
    anew in each document has about as many.
    """
    inside = window_pairs(sequence_length, documents)
    in_blocks = window_pairs(block_size, documents) * sequence_length / block_size
    if clean_copy:
        return inside + in_blocks
    return (inside + in_blocks) / 2 if causal else inside


def supervised_per_sequence(config: Config, stage: Stage) -> float:
    """Positions of a sequence that have a loss, on average."""
    diffusion = diffusion_of(config.diffusion, config.schedule.stages[stage.index])
    return stage.geometry.supervised(diffusion, stage.sequence_length)


def read_before_per_sequence(config: Config, stage: Stage) -> float:
    """Positions of a sequence that a pass before the step's own reads out, on average."""
    diffusion = diffusion_of(config.diffusion, config.schedule.stages[stage.index])
    return stage.geometry.read_before.rows(diffusion, stage.sequence_length)


def pairs_per_sequence(config: Config, stage: Stage, documents: DocumentLengths | None = None) -> float:
    """Visible query-key pairs of a layer in one sequence, per head; without `documents` of one document."""
    return expected_pairs(
        stage.sequence_length,
        stage.block_size,
        clean_copy=stage.clean_copy,
        causal=stage.geometry.causal,
        documents=documents,
    )


def model_flops_per_token(config: Config, stage: Stage, documents: DocumentLengths | None = None) -> float:
    """FLOPs of training per data token; attention counts visible pairs, and nothing is recomputed.

    Behind the last layer's attention rows count that something reads there (config/last_layer.py).
    """
    length = stage.sequence_length
    flops = training_flops_per_sequence(
        config.model,
        positions=length * stage.rows_per_token,
        pairs=pairs_per_sequence(config, stage, documents),
        supervised=supervised_per_sequence(config, stage),
        last_positions=length * needed_rows_per_token(config, stage),
    )
    return flops / length


def peak_flops(cluster: ClusterConfig, dtype: str) -> float:
    """FLOP/s of one device in matrix products of a dtype; 0 where the cluster does not say."""
    return 1e12 * getattr(cluster, PEAK_SETTING[dtype])


def mfu(
    config: Config,
    stage: Stage,
    tokens_per_sec: float,
    *,
    devices: int,
    documents: DocumentLengths | None = None,
) -> float:
    """Model FLOPs over the peak of all devices, 0 to 1, at so many data tokens per second in a stage."""
    needed = model_flops_per_token(config, stage, documents) * tokens_per_sec
    return needed / (peak_flops(config.cluster, config.precision.dtype) * devices)


@lru_cache(maxsize=256)
def window_pairs(tokens: int, documents: DocumentLengths | None) -> float:
    """Expected ordered pairs of one document in a window of a packed stream; all of them without documents.

    w + 2 sum over distances d of (w - d) same_document(d).
    """
    if documents is None:
        return float(tokens * tokens)
    return tokens + 2 * sum((tokens - d) * documents.same_document(d) for d in range(1, tokens))
