"""What happens to a file on its way: bytes lost, changed and repeated, extreme numbers, other values.

A mutation is a list of steps that hypothesis draws and shrinks; `apply` carries it out on any content.
"""

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st

NUMBERS = (0, 1, -1, 127, 2**16, 2**31 - 1, -(2**31), 2**40, 2**63 - 1, -(2**63))
HUGE = "9" * 5000
"""More digits than Python makes an int of."""
VALUES: tuple[Any, ...] = (
    None, True, "", "x", "../../x", "\x00", [], {}, [[]], {"": None}, [None] * 3, 0.5, 1e300, float("nan"),
    float("inf"), *NUMBERS,
)  # fmt: skip
RAW = (
    HUGE, "1e999", "NaN", "-Infinity", '"\\ud800"', "[" * 100_000, '{"a":' * 100_000, "[" * 999 + "]" * 999,
    "\ufeff",
)  # fmt: skip
MARK = "the value to be replaced"

Step = tuple[str, int, int, Any]
"""(kind, where, how much, with what); numbers are taken modulo what there is."""

_AT, _BYTES = st.integers(0, 2**20), st.binary(min_size=1, max_size=8)
_OF_BYTES = st.one_of(
    st.tuples(st.just("flip"), _AT, st.integers(1, 255), st.none()),
    st.tuples(st.just("insert"), _AT, st.just(0), _BYTES),
    st.tuples(st.just("delete"), _AT, st.integers(1, 64), st.none()),
    st.tuples(st.just("truncate"), _AT, st.just(0), st.none()),
    st.tuples(st.just("repeat"), _AT, st.integers(1, 256), _AT),
    st.tuples(st.just("number"), _AT, st.sampled_from((2, 4, 8)), st.sampled_from(NUMBERS)),
    # Headers lie at the beginning.
    st.tuples(st.just("number"), st.integers(0, 64), st.sampled_from((4, 8)), st.sampled_from(NUMBERS)),
)
_OF_VALUES = st.one_of(
    st.tuples(st.just("value"), _AT, st.just(0), st.sampled_from(VALUES)),
    st.tuples(st.just("raw"), _AT, st.just(0), st.sampled_from(RAW)),
    st.tuples(st.just("remove"), _AT, st.just(0), st.none()),
)
OF_BYTES = st.lists(_OF_BYTES, min_size=1, max_size=3)
OF_JSON = st.one_of(OF_BYTES, st.lists(_OF_VALUES, min_size=1, max_size=3))


def apply(content: bytes, steps: list[Step]) -> bytes:
    """The content after the steps; those of values change a JSON document, if it still is one."""
    for step in steps:
        content = (
            _of_value(content, step) if step[0] in ("value", "raw", "remove") else _of_bytes(content, step)
        )
    return content


def _of_bytes(content: bytes, step: Step) -> bytes:
    kind, at, much, what = step
    at %= max(len(content), 1)
    before, after = content[:at], content[at:]
    match kind:
        case "flip":
            return before + bytes(byte ^ much for byte in after[:1]) + after[1:]
        case "insert":
            return before + what + after
        case "delete":
            return before + after[much:]
        case "truncate":
            return before
        case "repeat":
            start = what % max(len(content), 1)
            return before + content[start : start + much] + after
        case _:
            return before + struct.pack("<q", what)[:much] + after[much:]


def _of_value(content: bytes, step: Step) -> bytes:
    kind, at, _, what = step
    try:
        document = json.loads(content)
        places = list(_places(document))
    except (ValueError, RecursionError):
        return content
    if not places:
        return content
    holder, key = places[at % len(places)]
    if kind == "remove":
        del holder[key]
    else:
        holder[key] = MARK if kind == "raw" else what
    return json.dumps(document).replace(json.dumps(MARK), what if kind == "raw" else "").encode()


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield document, key
            yield from _places(value)


def signed(sign: Callable[[dict[str, Any]], str], content: bytes) -> bytes:
    """A document with the digest that its writer would give it."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        return content
    if not isinstance(document, dict):
        return content
    document.pop("sha256", None)
    return json.dumps({"sha256": sign(document), **document}).encode()
