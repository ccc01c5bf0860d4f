"""Concepts of DLCM (arXiv 2512.24617): where they begin, what they are made of, and which ones a token sees.

All samples of a micro-batch are one row of T tokens, sample after sample, so that documents are the only
borders. A concept is a run of neighbouring tokens of one document; the concepts of all documents are one row
of M, in order.

Legend: T tokens, D documents, M concepts, H hidden size, C channels of the detector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def boundary_probability(query_TC: Tensor, key_TC: Tensor, starts: Tensor) -> Tensor:
    """p [T] = (1 - cos(q of the token before, k)) / 2, and 1 where a document starts; fp32 or wider.

    It reads a token and the one before it. starts: int64 [D], the documents' first tokens.
    """
    query_TC, key_TC = (
        each.to(torch.promote_types(each.dtype, torch.float32)) for each in (query_TC, key_TC)
    )
    cosine = torch.cosine_similarity(query_TC[:-1], key_TC[1:], dim=-1)
    p_T = torch.cat([cosine.new_ones(1), (1 - cosine) / 2]).clamp(0, 1)
    return p_T.index_fill(0, starts, 1.0)


def sharpened(p: Tensor, tau: float) -> Tensor:
    """Probabilities nearer to 0 or 1: p^(1/tau) from 0.5 on, 1 - (1 - p)^(1/tau) below (ConceptMoE, arXiv
    2601.21420, eq. 5)."""
    return torch.where(p >= 0.5, p ** (1 / tau), 1 - (1 - p) ** (1 / tau))


def opened(probability_T: Tensor, starts: Tensor, draws_T: Tensor | None = None) -> Tensor:
    """Which tokens open a concept, bool [T]: draws below the probability, or without draws p >= 0.5.

    A document's first token always does.
    """
    chosen = probability_T >= 0.5 if draws_T is None else draws_T < probability_T
    return chosen.index_fill(0, starts, True)


def chosen_probability(p_T: Tensor, opened_T: Tensor) -> Tensor:
    """The probability of what was chosen, with the value 1: its gradient is the straight-through estimator of
    H-Net (arXiv 2507.07955)."""
    chosen = torch.where(opened_T, p_T, 1 - p_T)
    return 1 + (chosen - chosen.detach())


def parser_loss(F: Any, G: Any, R: float) -> Any:
    """R/(R-1) ((R-1) F G + (1-F)(1-G)) - 1: 0 at F = 1/R, pulls G towards it elsewhere; may be negative.

    F: share of the tokens that open a concept, G: mean probability, both over the global batch.
    """
    return R / (R - 1) * ((R - 1) * F * G + (1 - F) * (1 - G)) - 1


def parser_slope(F: Any, R: float) -> Any:
    """Its derivative by G."""
    return R / (R - 1) * (R * F - 1)


@dataclass(frozen=True)
class Segments:
    """Concepts of T tokens: which tokens they have, on the host.

    Attributes:
        opened: bool [T], True where a concept begins; each document's first token is one.
        starts: int64 [D], the documents' first tokens.
    """

    opened: np.ndarray
    starts: np.ndarray

    @cached_property
    def concept(self) -> np.ndarray:
        """Each token's concept, int64 [T]."""
        return np.cumsum(self.opened) - 1

    @cached_property
    def document(self) -> np.ndarray:
        """Each token's document, int64 [T]."""
        return np.searchsorted(self.starts, np.arange(len(self.opened)), side="right") - 1

    @cached_property
    def first(self) -> np.ndarray:
        """Each concept's first token, int64 [M]."""
        return np.flatnonzero(self.opened)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Each concept's tokens, int64 [M]."""
        return np.diff(np.append(self.first, len(self.opened)))

    @property
    def count(self) -> int:
        """M."""
        return len(self.first)

    @cached_property
    def document_starts(self) -> np.ndarray:
        """Each document's first concept, int64 [D]."""
        return self.concept[self.starts]


def pooled_sum(hidden_TH: Tensor, concept_T: Tensor, count: int) -> Tensor:
    """Sum of each concept's tokens, [count, H], in fp32 or wider, token after token."""
    wide = hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
    return wide.new_zeros(count, wide.shape[1]).index_add(0, concept_T, wide)


def pooled_mean(hidden_TH: Tensor, concept_T: Tensor, lengths_M: Tensor) -> Tensor:
    """Mean of each concept's tokens, [M, H], summed in fp32 or wider.

    lengths_M: int64, the tokens of each concept; one of none has the mean 0.
    """
    sums_MH = pooled_sum(hidden_TH, concept_T, len(lengths_M))
    return (sums_MH / lengths_M.clamp(min=1)[:, None]).to(hidden_TH.dtype)


def smoothed(concepts_MH: Tensor, weight_M: Tensor) -> Tensor:
    """s_m = a_m c_m + (1 - a_m) s_{m-1}, [M, H], in fp32 or wider: a moving average of the past (H-Net).

    weight_M: a, with 1 at a document's first concept, so that documents stay apart.
    """
    return _Smoothed.apply(concepts_MH, weight_M)


class _Smoothed(torch.autograd.Function):
    """Keeps its inputs and outputs alone: the gradient of such an average is one from the other end."""

    @staticmethod
    def forward(ctx: Any, concepts_MH: Tensor, weight_M: Tensor) -> Tensor:
        wide = torch.promote_types(concepts_MH.dtype, torch.float32)
        a_M1, c_MH = weight_M.to(wide)[:, None], concepts_MH.to(wide)
        s_MH = _recurrence(1 - a_M1, a_M1 * c_MH)
        ctx.save_for_backward(concepts_MH, weight_M, s_MH)
        return s_MH.to(concepts_MH.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_MH: Tensor) -> tuple[Tensor, Tensor]:
        concepts_MH, weight_M, s_MH = ctx.saved_tensors
        a_M1 = weight_M.to(s_MH.dtype)[:, None]
        kept_M1 = torch.cat([1 - a_M1[1:], a_M1.new_zeros(1, 1)])  # of s_m in s_{m+1}
        g_MH = _recurrence(kept_M1.flip(0), gradient_MH.to(s_MH.dtype).flip(0)).flip(0)
        before_MH = torch.cat([s_MH.new_zeros(1, s_MH.shape[1]), s_MH[:-1]])
        of_weight_M = (g_MH * (concepts_MH.to(s_MH.dtype) - before_MH)).sum(dim=-1)
        return (a_M1 * g_MH).to(concepts_MH.dtype), of_weight_M.to(weight_M.dtype)


def _recurrence(kept_M1: Tensor, added_MH: Tensor) -> Tensor:
    """s_m = kept_m s_{m-1} + added_m from s_{-1} = 0, in log2(M) steps (Hillis and Steele, CACM 1986).

    Entry m is computed from entries up to m alone, in an order that M does not change.
    """
    step = 1
    while step < len(kept_M1):
        added_MH = torch.cat([added_MH[:step], added_MH[step:] + kept_M1[step:] * added_MH[:-step]])
        kept_M1 = torch.cat([kept_M1[:step], kept_M1[step:] * kept_M1[:-step]])
        step *= 2
    return added_MH
