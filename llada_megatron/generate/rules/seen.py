"""What a decoding rule reads and what it returns: a rule is a pure function of one block, on the host.

An engine (a loop, caches, batches, layouts) calls it once per forward of the block:

    state = None
    for step in itertools.count():
        seen = Seen(step=step, ..., **figures_of(rule.figures, output, mask_token_id))
        change = rule.step(seen, state)
        tokens, state = change.tokens_m, change.state
        if change.is_done: break

Keys and values of a block may be kept from a forward that read its final tokens, each of them wholly
(`Change.weight_m`): from the last one if that changed nothing (`change.is_done and not
change.changes(seen)`), else from one more, which no rule sees.

Legend: m positions of a block, k of them, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from llada_megatron.model.readout import LOGITS, Readout, proposal
from llada_megatron.parallel.random import Purpose, generator


class Figures(StrEnum):
    """What a rule needs of the head; few numbers per row travel but for `logits`."""

    top_one = "top_one"
    """The proposed token and its probability."""
    entropy = "entropy"
    """Those, and the entropy of the distribution in nats."""
    label = "label"
    """Those of `top_one`, and the probability of a token that is named: the one that a row shadows."""
    logits = "logits"
    """All logits of each row; what the others have is computed from them on the host."""

    def readout(self, mask_token_id: int) -> Readout:
        """The readout whose output `figures_of` and `label_probability` take."""
        if self is Figures.logits:
            return LOGITS
        return proposal(mask_token_id, entropy=self is Figures.entropy, label=self is Figures.label)


@dataclass(frozen=True)
class Draws:
    """Uniform numbers, a function of (seed, prompt, position, step): no batch or layout can change them."""

    seed: int
    prompt: int = 0
    """Number of the prompt among those that share the seed."""

    def uniform(self, position: int, step: int, count: int) -> np.ndarray:
        """float64 [count] in [0, 1) of an absolute position and a forward of its block."""
        return generator(self.seed, Purpose.DECODING, self.prompt, position, step).random(count)

    def remasking(self, position: int, step: int) -> float:
        """A number in [0, 1) that no token is drawn with."""
        return float(generator(self.seed, Purpose.REMASKING, self.prompt, position, step).random())

    def order(self, position: int, step: int) -> float:
        """One more of the same position and forward, which no `uniform` shares."""
        return generator(self.seed, Purpose.DECODING_ORDER, self.prompt, position, step).random()


@dataclass(frozen=True)
class Seen:
    """What one forward read of one block and said about it.

    A row that is given holds figures that mean nothing; so does one that is not masked, for a rule that does
    not edit: no engine needs to apply the head to them.
    """

    tokens_m: np.ndarray
    """int64: what the forward read."""
    is_prompt_m: np.ndarray
    """bool: given tokens, which never change."""
    is_masked_m: np.ndarray
    """bool: the mask token stands there, and is not given."""
    choice_m: np.ndarray
    """int64: the most probable token but the mask, the lowest id among equals."""
    probability_m: np.ndarray
    """float64: of `choice_m`, among all tokens."""
    entropy_m: np.ndarray | None = None
    """float64, nats: where `rule.figures` is `entropy`."""
    logits_mV: np.ndarray | None = None
    """float32: where `rule.figures` is `logits`."""
    verified_m: np.ndarray | None = None
    """float64, where `rule.verifies`: the probability of the token that stands there by a row that does not
    see it (a shadow, attention/keys.py); 1 where it is a mask or given."""
    step: int = 0
    """Forwards that this block has had before."""
    first: int = 0
    """Position of the block's first token in its sequence."""
    mask_token_id: int = -1
    draws: Draws = Draws(seed=0)
    must_fill: bool = True
    """Masks are filled even where the rule is sure of none. False for a block behind one that is not decided
    far enough (generate/buffer.py)."""

    def at_least(self, need: int) -> int:
        """How many masks a rule that wants to fill `need` has to."""
        return need if self.must_fill else 0


@dataclass(frozen=True)
class Change:
    """What becomes of the block."""

    tokens_m: np.ndarray
    """int64, an array of its own."""
    is_done: bool
    """`tokens_m` is final. A rule that edits may go on without masks; one that does not is done then."""
    state: Any = None
    """Handed back with the block's next forward."""
    weight_m: np.ndarray | None = None
    """float64, from 0 to 1: how much of its embedding in the next forward is the token's, the rest being the
    mask token's. None: all of it, as it is everywhere once the block is done."""

    def changes(self, seen: Seen) -> bool:
        """Whether a token is another than the forward read."""
        return not np.array_equal(self.tokens_m, seen.tokens_m)


class Rule:
    """A frozen dataclass whose fields are its settings, with their ranges, which `rule_of` checks.

    `step` is what an engine calls; a rule defines `decide`, and `read` where it decides on other figures than
    the model's own. It must be done after some number of forwards whatever the model says: each forward that
    it is not fills a masked position or counts against a limit, where `Seen.must_fill`.
    """

    @property
    def figures(self) -> Figures:
        """What it needs of the head."""
        return Figures.top_one

    @property
    def edits(self) -> bool:
        """Whether it may change tokens that are neither masked nor given."""
        return False

    @property
    def verifies(self) -> bool:
        """Whether it needs `Seen.verified_m`, for which a forward reads each such token's place once more."""
        return False

    def read(self, seen: Seen, state: Any) -> tuple[Seen, Any]:
        """What it decides on: figures in the place of the model's, and the state that goes with them."""
        return seen, state

    def decide(self, seen: Seen, state: Any) -> Change:
        """What becomes of the block, of what `read` returned."""
        raise NotImplementedError

    def step(self, seen: Seen, state: Any) -> Change:
        """The block after a forward; state: None at the block's first, then what the last change brought."""
        return self.decide(*self.read(seen, state))


def figures_of(figures: Figures, output_mC: np.ndarray, mask_token_id: int) -> dict[str, np.ndarray]:
    """The fields of `Seen` that the output of `figures.readout(mask_token_id)` holds, for its m rows."""
    if figures is Figures.logits:
        logits_mV = output_mC.astype(np.float32)
        choice_m, probability_m = proposed(logits_mV, mask_token_id)
        return {"choice_m": choice_m, "probability_m": probability_m, "logits_mV": logits_mV}
    choice_m, *columns = output_mC.astype(np.float64).T
    names = ("probability_m", "entropy_m") if figures is Figures.entropy else ("probability_m",)
    return {"choice_m": choice_m.astype(np.int64)} | dict(zip(names, columns, strict=False))


def label_probability(figures: Figures, output_nC: np.ndarray, labels_n: np.ndarray) -> np.ndarray:
    """float64 [n]: of the named token, int64 [n], from the output of the readout of `label` or `logits`."""
    if figures is Figures.logits:
        return np.exp(log_probability(output_nC.astype(np.float32))[np.arange(len(labels_n)), labels_n])
    assert figures is Figures.label
    return output_nC[:, -1].astype(np.float64)


def proposed(logits_mV: np.ndarray, *hidden: int) -> tuple[np.ndarray, np.ndarray]:
    """The most probable token but the `hidden` ones, int64 [m]; its probability among all, float64 [m]."""
    choice_m = without(logits_mV, *hidden).argmax(axis=-1)
    return choice_m, np.exp(log_probability(logits_mV)[np.arange(len(choice_m)), choice_m])


def without(logits_mV: np.ndarray, *hidden: int) -> np.ndarray:
    """A copy of the logits in which these tokens have none."""
    allowed_mV = logits_mV.copy()
    allowed_mV[:, [token for token in hidden if 0 <= token < logits_mV.shape[-1]]] = -np.inf
    return allowed_mV


def log_probability(logits_mV: np.ndarray) -> np.ndarray:
    """log softmax, float64 [m, V]."""
    shifted_mV = logits_mV.astype(np.float64) - logits_mV.max(axis=-1, keepdims=True)
    return shifted_mV - np.log(np.exp(shifted_mV).sum(axis=-1, keepdims=True))


def entropy(log_p_mV: np.ndarray) -> np.ndarray:
    """float64 [m], nats; what has no probability adds nothing."""
    p_mV = np.exp(log_p_mV)
    return -(p_mV * np.where(p_mV > 0, log_p_mV, 0)).sum(axis=-1)


def filled(seen: Seen, accepted_k: np.ndarray, state: Any = None) -> Change:
    """The proposed tokens at the accepted positions, int64 [k]; done when no mask is left."""
    tokens_m = seen.tokens_m.copy()
    tokens_m[accepted_k] = seen.choice_m[accepted_k]
    is_masked_m = seen.is_masked_m.copy()
    is_masked_m[accepted_k] = False
    return Change(tokens_m, not is_masked_m.any(), state)


def above(seen: Seen, threshold: float, need: int) -> np.ndarray:
    """int64 [k]: masks with p > threshold if they are `need`, else the `need` most probable.

    Those with p > threshold alone where the block need not fill.
    """
    masked_n = np.flatnonzero(seen.is_masked_m)
    accepted_k = masked_n[seen.probability_m[masked_n] > threshold]
    return accepted_k if len(accepted_k) >= seen.at_least(need) else most_probable(seen, masked_n)[:need]


def most_probable(seen: Seen, among_n: np.ndarray) -> np.ndarray:
    """int64 [n]: positions by falling probability, the first ones first among equals."""
    return among_n[np.argsort(-seen.probability_m[among_n], kind="stable")]


def share(total: int, steps: int, step: int) -> int:
    """The share of forward `step` of `steps`: total // steps, one more in the first total % steps.

    At least one; steps 0: one each.
    """
    return 1 if not steps else max(total // steps + int(step < total % steps), 1)
