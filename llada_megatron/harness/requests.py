"""What tasks ask of a model, in tokens, and what it answers: plain data between lm-eval and the ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

GENERATE, SCORE, ROLLING = "generate_until", "loglikelihood", "loglikelihood_rolling"
"""Kinds of requests, by lm-eval's names."""
GREEDY = "greedy"
"""Whether greedy decoding gives a continuation: asked for beside its likelihood."""
Key = tuple[str, str, str, int]
"""Kind, decoding (empty but for `generate_until`), task, and the request's number in it."""


@dataclass(frozen=True)
class Request:
    """One request of a task."""

    kind: str
    task: str
    number: int
    """Among those of its task and kind: with the seed it decides draws."""
    digest: str
    """Of what was asked, in text."""


@dataclass(frozen=True)
class Generation(Request):
    """Text that goes on from a prompt."""

    tokens: Sequence[int] = ()
    new_tokens: int = 0
    strings: Sequence[str] = ()
    sampling: Mapping[str, str] = field(default_factory=dict)
    """The task's own settings of drawing tokens; a command's go before them."""


@dataclass(frozen=True)
class Score(Request):
    """The likelihood of a continuation."""

    context: Sequence[int] = ()
    continuation: Sequence[int] = ()
    wants_greedy: bool = False
    """Whether a metric of the task reads what greedy decoding gives."""


def digest_of(arguments: Sequence[Any]) -> str:
    """Names what a request asks for, whatever else is asked."""
    return hashlib.sha256(repr(tuple(arguments)).encode(errors="replace")).hexdigest()[:16]


def key_of(answer: Mapping[str, Any]) -> Key:
    """The key of an answer, a line of JSON."""
    return answer["kind"], answer["decoding"], answer["task"], answer["number"]
