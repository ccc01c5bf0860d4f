"""Blocks of tokens as text, and what a forward says of them, for tests of decoding rules."""

import numpy as np

from llada_megatron.generate.rules import Draws, Figures, Seen, figures_of, rule_of
from llada_megatron.generate.rules.seen import entropy, log_probability

MASK, DELETE, SPLIT, VOCABULARY = 15, 14, 13, 16
ORDERS = {"delete_id": DELETE, "split_id": SPLIT}


def block(text):
    """Tokens of a block: digits, `_` for a mask; those before a `|` are given."""
    given, _, rest = text.rpartition("|")
    tokens = np.array([MASK if c == "_" else int(c) for c in given + rest])
    return tokens, np.arange(len(tokens)) < len(given)


def seen_of(text, probability=None, choice=None, **more):
    """What a forward said of a block; the choice of position i is i unless given."""
    tokens, is_prompt = block(text)
    choice = np.arange(len(tokens)) if choice is None else np.array(choice)
    probability = np.zeros(len(tokens)) if probability is None else np.array(probability, dtype=float)
    is_masked = (tokens == MASK) & ~is_prompt
    return Seen(tokens, is_prompt, is_masked, choice, probability, mask_token_id=MASK, **more)


def seen_logits(text, logits, **more):
    tokens, is_prompt = block(text)
    figures = figures_of(Figures.logits, np.asarray(logits), MASK)
    return Seen(tokens, is_prompt, (tokens == MASK) & ~is_prompt, **figures, mask_token_id=MASK, **more)


def logits_of(*rows):
    """Rows of tokens from most to least likely, ten nats apart from the rest."""
    table = np.full((len(rows), VOCABULARY), -20.0)
    for row, tokens in zip(table, rows, strict=True):
        row[list(tokens)] = 10.0 - np.arange(len(tokens))
    return table


def text_of(change):
    return "".join("_" if token == MASK else format(token, "x") for token in change.tokens_m)


def filled(name, text, probability, settings=None, **more):
    """The block after a first forward under a rule."""
    return text_of(rule_of(name, settings).step(seen_of(text, probability, **more), None))


def decoded(name, text, logits_at, settings=None, seed=0, prompt=0, most=60):
    """Every (seen, change) of a block until the rule is done; logits_at: step -> [m, V]."""
    rule = rule_of(name, (ORDERS if name == "indel" else {}) | (settings or {}))
    state, found, (tokens, is_prompt) = None, [], block(text)
    for step in range(most):
        logits = logits_at(step)
        figures = figures_of(Figures.logits, logits, MASK)
        if rule.figures is not Figures.logits:
            del figures["logits_mV"]
            figures["entropy_m"] = entropy(log_probability(logits))
        is_masked = (tokens == MASK) & ~is_prompt
        standing = np.exp(log_probability(logits))[np.arange(len(tokens)), tokens]
        seen = Seen(
            tokens,
            is_prompt,
            is_masked,
            **figures,
            verified_m=np.where(is_prompt | is_masked, 1.0, standing),
            step=step,
            first=32,
            mask_token_id=MASK,
            draws=Draws(seed, prompt),
        )
        change = rule.step(seen, state)
        found.append((seen, change))
        tokens, state = change.tokens_m, change.state
        if change.is_done:
            return found
    raise AssertionError(f"{name} is not done after {most} forwards")


def noisy(seed, m, scale=3.0):
    def logits_at(step):
        logits = np.random.default_rng([seed, step]).normal(size=(m, VOCABULARY)) * scale
        logits[:, MASK] += 3  # what must not be proposed is likely
        return logits

    return logits_at
