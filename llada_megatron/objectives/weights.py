"""Weights and denominators of the masked positions' cross entropy.

The loss of a global batch is  sum_i w_i CE_i / count,  summed over supervised positions i and counted over
the whole batch, so that one division (megatron-core's per-token loss) serves every denominator:

    tokens    w_i = w(t_i)         count = maskable tokens     (default; BD3-LM, LLaDA: sum / (B L))
    masked    w_i = w(t_i)         count = masked tokens       (dFactory, with one sequence per micro-batch)
    sequence  w_i = w(t_i) / n_b   count = sequences           (mean over sequences of sum / n_b)
    document  w_i = w(t_i) / n_d   count = documents           (mean over documents of sum / n_d)
    batch     w_i = w(t_i)         count = sequences           (sum / B)

n_b are the maskable tokens of the sequence that holds i, n_d those of its document (conversation, in packed
chats). Maskable are all tokens of plain text and the answers of chats; documents without any are not
counted. w(t) = -alpha'_t / (1 - alpha_t), which is 1/t for alpha_t = 1 - t, or 1 (`flat`). LLaDA2.0's
equations 1, 2 and 5 print alpha'_t / (1 - alpha_t) behind a leading minus, the negative of the loss its
prose describes: w(t) >= 0 here. There is no logit shift: the output at a masked position predicts that
position. An empty mask adds nothing to the sum.
"""

from __future__ import annotations

import numpy as np

from llada_megatron.config.schema import Denominator, DiffusionConfig, Weight
from llada_megatron.objectives.corruption import Corruption


def position_weights(
    corruption: Corruption,
    diffusion: DiffusionConfig,
    cu_seqlens: np.ndarray,
    maskable: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """Weights float64 [L] (zero where not masked) of one sequence and what it adds to the count.

    cu_seqlens: int [documents + 1]. maskable: bool [L], False for positions that are never masked (prompts);
    default: every position.
    """
    maskable_tokens = len(corruption.masked) if maskable is None else int(maskable.sum())
    weights = corruption.masked.astype(np.float64)
    if diffusion.weight is Weight.inverse:
        weights = np.divide(weights, corruption.rate, out=np.zeros_like(weights), where=corruption.masked)
    match diffusion.denominator:
        case Denominator.tokens:
            return weights, maskable_tokens
        case Denominator.masked:
            return weights, int(corruption.masked.sum())
        case Denominator.sequence:
            return weights / max(maskable_tokens, 1), 1
        case Denominator.document:
            lengths = np.diff(cu_seqlens)
            ones = np.ones(len(weights), int) if maskable is None else maskable.astype(int)
            per_document = np.add.reduceat(ones, cu_seqlens[:-1])
            return weights / np.repeat(np.maximum(per_document, 1), lengths), int((per_document > 0).sum())
        case Denominator.batch:
            return weights, 1


def embedding_noise_sigma(sigma_over_rms: float, fade_tokens: int, diffusion_tokens: int) -> float:
    """sigma / RMS after `diffusion_tokens` of conversion: a linear fade to zero over `fade_tokens`."""
    if sigma_over_rms == 0:
        return 0.0
    return sigma_over_rms * max(0.0, 1 - diffusion_tokens / fade_tokens)
