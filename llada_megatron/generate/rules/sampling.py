"""What is drawn before any rule looks: tokens in the place of the most probable ones, and an order.

Legend: n drawn positions of a block, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np

from llada_megatron.config.ranges import Amount, Count, Range
from llada_megatron.generate.rules.seen import (
    Change,
    Draws,
    Figures,
    Rule,
    Seen,
    entropy,
    log_probability,
    without,
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; at temperature 0 they are not. And whether their order is."""

    temperature: Amount = 0.0
    top_k: Count = 0
    """Draws are from so many tokens, and those that equal the last of them; 0: from all."""
    top_p: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Draws are from the most probable tokens, as many as it takes to have more than this; 1: all."""
    plain_confidence: bool = False
    """A rule judges the model's own probability and entropy, as in LLaDA's `generate`; else those of what
    is drawn from, as in LLaDA2's."""
    random_order: bool = False
    """A rule judges a uniform number in the place of each mask's probability, as `remasking="random"` of
    LLaDA's `generate` has it."""


@dataclass(frozen=True)
class Sampled(Rule):
    """A rule that is proposed drawn tokens: argmax of log q + g, with Gumbel noise g, is a draw from q.

    q is the softmax of logits / temperature, cut to top_k and then to top_p, without the mask token. Each
    number g is a function of (seed, prompt, position, step, token).
    """

    rule: Rule
    sampling: Sampling

    @property
    def figures(self) -> Figures:
        return Figures.logits

    @property
    def edits(self) -> bool:
        return self.rule.edits

    @property
    def verifies(self) -> bool:
        return self.rule.verifies

    def read(self, seen: Seen, state: Any) -> tuple[Seen, Any]:
        seen, state = self.rule.read(seen, state)
        assert seen.logits_mV is not None
        rows_n = np.flatnonzero(~seen.is_prompt_m if self.edits else seen.is_masked_m)
        logits_nV = seen.logits_mV[rows_n]
        log_q_nV = self._drawn_from(logits_nV, seen.mask_token_id)
        uniform_nV = _uniform(seen.draws, rows_n + seen.first, seen.step, logits_nV.shape[-1])
        with np.errstate(divide="ignore"):
            choice_n = (log_q_nV - np.log(-np.log(uniform_nV))).argmax(axis=-1)
        judged_nV = log_probability(logits_nV) if self.sampling.plain_confidence else log_q_nV
        choice_m, probability_m = seen.choice_m.copy(), seen.probability_m.copy()
        choice_m[rows_n] = choice_n
        probability_m[rows_n] = np.exp(judged_nV[np.arange(len(rows_n)), choice_n])
        entropy_m = np.zeros(len(choice_m))
        if self.rule.figures is Figures.entropy:
            entropy_m[rows_n] = entropy(judged_nV)
        return replace(seen, choice_m=choice_m, probability_m=probability_m, entropy_m=entropy_m), state

    def decide(self, seen: Seen, state: Any) -> Change:
        return self.rule.decide(seen, state)

    def _drawn_from(self, logits_nV: np.ndarray, mask_token_id: int) -> np.ndarray:
        """log q, float64 [n, V]."""
        logits_nV = without(logits_nV, mask_token_id).astype(np.float64) / self.sampling.temperature
        V = logits_nV.shape[-1]
        if 0 < self.sampling.top_k < V:
            least_n1 = np.partition(logits_nV, V - self.sampling.top_k, axis=-1)[:, [V - self.sampling.top_k]]
            logits_nV[logits_nV < least_n1] = -np.inf
        if self.sampling.top_p < 1:
            order_nV = np.argsort(-logits_nV, axis=-1, kind="stable")
            p_nV = np.exp(log_probability(np.take_along_axis(logits_nV, order_nV, axis=-1)))
            is_cut_nV = p_nV.cumsum(axis=-1) - p_nV > self.sampling.top_p
            np.put_along_axis(is_cut_nV, order_nV, is_cut_nV.copy(), axis=-1)
            logits_nV[is_cut_nV] = -np.inf
        return log_probability(logits_nV)


def _uniform(draws: Draws, positions_n: np.ndarray, step: int, count: int) -> np.ndarray:
    """float64 [n, count]."""
    rows = [draws.uniform(int(position), step, count) for position in positions_n]
    return np.stack(rows) if rows else np.zeros((0, count))


@dataclass(frozen=True)
class RandomOrder(Rule):
    """A rule for which the probability of a masked position is a uniform number, a function of
    (seed, prompt, position, step).

    With `Quota(1.0, steps)` it is LLaDA's (arXiv 2502.09992) `remasking="random"`: so many masks are filled,
    whichever they are.
    """

    rule: Rule

    @property
    def figures(self) -> Figures:
        return self.rule.figures

    @property
    def edits(self) -> bool:
        return self.rule.edits

    @property
    def verifies(self) -> bool:
        return self.rule.verifies

    def read(self, seen: Seen, state: Any) -> tuple[Seen, Any]:
        seen, state = self.rule.read(seen, state)
        probability_m = seen.probability_m.copy()
        for place in np.flatnonzero(seen.is_masked_m):
            probability_m[place] = seen.draws.order(seen.first + int(place), seen.step)
        return replace(seen, probability_m=probability_m), state

    def decide(self, seen: Seen, state: Any) -> Change:
        return self.rule.decide(seen, state)
