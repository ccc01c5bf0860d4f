"""What the text itself says, without a model: entropies of its tokens, bytes per token."""

from __future__ import annotations

import numpy as np

from llada_megatron.data.corpus import read_sidecar
from llada_megatron.data.packed import PackedSample


def bytes_per_token(prefixes: list[str]) -> float | None:
    """Bytes of text per token of the corpora; None when one was not prepared here and nobody counted."""
    sidecars = [read_sidecar(prefix) for prefix in prefixes]
    counted = [sidecar for sidecar in sidecars if sidecar is not None]
    if len(counted) < len(sidecars):
        return None
    return sum(sidecar["bytes"] for sidecar in counted) / sum(sidecar["tokens"] for sidecar in counted)


def entropies(samples: list[PackedSample]) -> dict[str, float]:
    """Unigram entropy H(x_i) and bigram entropy H(x_i | x_{i-1}) of the text itself, nats per token.

    In chats those of the answers, of which alone a likelihood is given.
    """
    tokens, previous, following = [], [], []
    for sample in samples:
        inside = np.setdiff1d(np.arange(len(sample.tokens)), sample.cu_seqlens[1:] - 1)
        if sample.supervised is None:
            tokens.append(sample.tokens)
        else:
            tokens.append(sample.tokens[sample.supervised])
            inside = inside[sample.supervised[inside + 1]]
        previous.append(sample.tokens[inside])
        following.append(sample.tokens[inside + 1])
    first, second = np.concatenate(previous), np.concatenate(following)
    joint = _entropy(first * (int(max(first.max(), second.max())) + 1) + second)
    return {"unigram": _entropy(np.concatenate(tokens)), "bigram": joint - _entropy(first)}


def _entropy(values: np.ndarray) -> float:
    share = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(share * np.log(share)).sum())
