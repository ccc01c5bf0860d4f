"""Rules that fill masked positions and leave every other token alone.

Legend: m positions of the block, n of them masked, k accepted, V vocabulary, S forwards of the block so far.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llada_megatron.config.ranges import Amount, Count, Decay, Factor, Positive, Share
from llada_megatron.generate.rules.seen import (
    Change,
    Figures,
    Rule,
    Seen,
    above,
    filled,
    log_probability,
    most_probable,
    proposed,
    share,
)


@dataclass(frozen=True)
class Threshold(Rule):
    """All with p > threshold, or the most probable one where there is none.

    LLaDA2.0 (arXiv 2512.15745), section 5.4, as SGLang's `low_confidence` does it.
    """

    threshold: Share = 0.95

    def decide(self, seen: Seen, state: Any) -> Change:
        return filled(seen, above(seen, self.threshold, 1))


@dataclass(frozen=True)
class Autoregressive(Rule):
    """The first one, whatever its probability: the only rule of models that predict next tokens."""

    def decide(self, seen: Seen, state: Any) -> Change:
        return filled(seen, np.flatnonzero(seen.is_masked_m)[: seen.at_least(1)])


@dataclass(frozen=True)
class Quota(Rule):
    """All with p > threshold if they are at least need_s, else the need_s most probable.

    need_s = m // steps, one more in the first m % steps forwards of the block; with as many steps as
    positions it is `Threshold`. As `generate` of LLaDA2's Hugging Face code and the block refinement of
    diffusers do it.
    """

    threshold: Share = 0.95
    steps: Count = 0
    """Forwards of a block at most; 0: as many as it has positions."""

    def decide(self, seen: Seen, state: Any) -> Change:
        need = share(len(seen.tokens_m), self.steps, seen.step)
        return filled(seen, above(seen, self.threshold, need))


@dataclass(frozen=True)
class FactorRule(Rule):
    """By falling probability, as long as the i-th has p >= 1 - factor / (i + 1); the first one always.

    Fast-dLLM (arXiv 2505.22618), as its `get_transfer_index_dynamic`.
    """

    factor: Factor = 1.0
    accepts_last: bool = False
    """As the public code: where the least probable one is the first to fail, it is accepted as well."""

    def decide(self, seen: Seen, state: Any) -> Change:
        order_n = most_probable(seen, np.flatnonzero(seen.is_masked_m))
        n = len(order_n)
        bound_n = 1 - self.factor / (np.arange(1, n + 1) + 1)
        first = seen.at_least(1)
        fails_k = np.flatnonzero(seen.probability_m[order_n][first:] < bound_n[first:]) + first
        count = int(fails_k[0]) if len(fails_k) else n
        if self.accepts_last and count == n - 1:
            count = n
        return filled(seen, order_n[:count])


@dataclass(frozen=True)
class Hierarchical(Rule):
    """The best of each run of masks if p > low_threshold, all with p > threshold, and the best of all.

    dInfer's `HierarchyDecoder`; every one of several equal best ones of a run is accepted.
    """

    threshold: Share = 0.9
    low_threshold: Share = 0.4

    def decide(self, seen: Seen, state: Any) -> Change:
        masked_n = np.flatnonzero(seen.is_masked_m)
        if not len(masked_n):
            return filled(seen, masked_n)
        p_n = seen.probability_m[masked_n]
        starts = np.flatnonzero(np.diff(masked_n, prepend=-2) > 1)
        lengths = np.diff(starts, append=len(masked_n))
        is_best_n = p_n == np.repeat(np.maximum.reduceat(p_n, starts), lengths)
        is_accepted_n = (is_best_n & (p_n > self.low_threshold)) | (p_n > self.threshold)
        is_accepted_n[p_n.argmax()] |= seen.must_fill
        return filled(seen, masked_n[is_accepted_n])


@dataclass(frozen=True)
class EntropyBound(Rule):
    """By rising entropy as long as those accepted before have no more than `entropy_bound` together.

    EB-Sampler (arXiv 2505.24857): sum of entropies minus the largest one <= gamma. The entropy is that of the
    model's distribution; SGLang's `eb_sampling` leaves the mask token out of it.
    """

    entropy_bound: Amount = 0.1
    """gamma, in nats."""

    @property
    def figures(self) -> Figures:
        return Figures.entropy

    def decide(self, seen: Seen, state: Any) -> Change:
        assert seen.entropy_m is not None
        masked_n = np.flatnonzero(seen.is_masked_m)
        order_n = masked_n[np.argsort(seen.entropy_m[masked_n], kind="stable")]
        spent_n = np.cumsum(seen.entropy_m[order_n])
        if seen.must_fill:
            spent_n = np.append(0.0, spent_n)[: len(order_n)]
        return filled(seen, order_n[spent_n <= self.entropy_bound])


@dataclass(frozen=True)
class Credits:
    """What was proposed before and what is left of it, [m, S]; a row has one credit per token."""

    tokens_mS: np.ndarray
    credits_mS: np.ndarray


@dataclass(frozen=True)
class Credit(Rule):
    """`Threshold` on logits + credit_alpha log(1 + M), where M [m, V] remembers what was proposed.

    M <- credit_beta M + p^credit_gamma at the model's most probable token of each masked position: dInfer's
    `CreditThresholdParallelDecoder`. Most of M is zero, and only the rest is kept.
    """

    threshold: Share = 0.9
    credit_alpha: Amount = 0.7
    credit_beta: Decay = 0.8
    credit_gamma: Amount = 0.2

    @property
    def figures(self) -> Figures:
        return Figures.logits

    def read(self, seen: Seen, state: Credits | None) -> tuple[Seen, Credits]:
        assert seen.logits_mV is not None
        choice_m1 = seen.choice_m[:, None]
        if state is None:
            nothing = np.zeros((len(choice_m1), 0))
            state = Credits(nothing.astype(np.int64), nothing)
        earned_m1 = np.where(seen.is_masked_m, seen.probability_m**self.credit_gamma, 0.0)[:, None]
        is_again_mS = (state.tokens_mS == choice_m1) & (state.credits_mS > 0)
        kept_mS = self.credit_beta * state.credits_mS + earned_m1 * is_again_mS
        new_m1 = np.where(is_again_mS.any(axis=1, keepdims=True), 0.0, earned_m1)
        state = Credits(np.hstack([state.tokens_mS, choice_m1]), np.hstack([kept_mS, new_m1]))
        logits_mV = seen.logits_mV.astype(np.float64)
        rows_m1 = np.arange(len(choice_m1))[:, None]
        np.add.at(logits_mV, (rows_m1, state.tokens_mS), self.credit_alpha * np.log1p(state.credits_mS))
        choice_m, probability_m = proposed(logits_mV, seen.mask_token_id)
        read = replace(seen, choice_m=choice_m, probability_m=probability_m, logits_mV=logits_mV)
        return read, state

    def decide(self, seen: Seen, state: Credits) -> Change:
        return filled(seen, above(seen, self.threshold, 1), state)


@dataclass(frozen=True)
class Watched:
    """What KLASS remembers: log p of the last forward, and the divergences of the last ones."""

    masked: int
    log_p_mV: np.ndarray
    divergence_mH: np.ndarray


@dataclass(frozen=True)
class Klass(Rule):
    """All with p > threshold whose last kl_history divergences KL(p_s || p_(s-1)) are below kl_threshold.

    Where there is none, the most probable ones of a quota: masks // steps, one more in the first ones. KLASS
    (arXiv 2511.05664). A block's first forward has no divergence; the public code compares it with zeros in
    the first block, which comes to the same, and with what was left of it in later ones.
    """

    threshold: Share = 0.9
    kl_threshold: Amount = 0.01
    kl_history: Positive = 2
    steps: Count = 0
    """Forwards of a block at most; 0: as many as it has masks."""

    @property
    def figures(self) -> Figures:
        return Figures.logits

    def decide(self, seen: Seen, state: Watched | None) -> Change:
        assert seen.logits_mV is not None
        log_p_mV = log_probability(seen.logits_mV)
        if state is None:
            masked, history_mH = (
                int(seen.is_masked_m.sum()),
                np.full((len(log_p_mV), self.kl_history), np.inf),
            )
        else:
            masked, p_mV = state.masked, np.exp(log_p_mV)
            # As the public code: a probability below 1e-12 counts as that.
            ratio_mV = np.logaddexp(log_p_mV, np.log(1e-12)) - np.logaddexp(state.log_p_mV, np.log(1e-12))
            divergence_m1 = (p_mV * ratio_mV).sum(axis=-1, keepdims=True)
            history_mH = np.hstack([state.divergence_mH[:, 1:], divergence_m1])
        is_stable_m = (history_mH < self.kl_threshold).all(axis=-1)
        accepted_k = np.flatnonzero(seen.is_masked_m & is_stable_m & (seen.probability_m > self.threshold))
        if not len(accepted_k):
            need = seen.at_least(share(masked, self.steps, seen.step))
            accepted_k = most_probable(seen, np.flatnonzero(seen.is_masked_m))[:need]
        return filled(seen, accepted_k, Watched(masked, log_p_mV, history_mH))
