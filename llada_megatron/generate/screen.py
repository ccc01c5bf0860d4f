"""An answer on a terminal while it is decoded: masked positions, text, edited text, and figures below.

Lines that will not change any more scroll away above; what still changes is drawn anew after each forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llada_megatron.config.quantities import so_many
from llada_megatron.generate.conversation import Answer, Draft
from llada_megatron.generate.prompt import PromptRead

REFRESH_SEC = 0.05
"""Between two pictures, at least; a forward of a small model is faster."""
BELOW = 3
"""Rows of the terminal that the picture leaves free, for the figures and the cursor."""
MASKED, EDITED, QUIET = "dim", "yellow underline", "dim"
BROKEN = "\ufffd"
"""What a part of a character decodes to."""
_BIDI = (0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_SHOWN: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(0x20)},
    **dict.fromkeys((0x7F, *range(0x80, 0xA0)), BROKEN),
    **dict.fromkeys((ord("\r"), *_BIDI), None),
    **dict.fromkeys((0x2028, 0x2029), " "),
    ord("\t"): "    ",
    ord("\n"): "\n",
}


def shown(text: str) -> str:
    """The text with pictures of control characters in their place, and without changes of direction: what a
    model writes moves no cursor."""
    return text.translate(_SHOWN)


def line_ends(text: str, width: int) -> list[int]:
    """Where its lines of at most `width` cells end, behind a space if there is one, the last line's left out.

    More text at the end changes none of them.
    """
    ends: list[int] = []
    cells, behind_space = 0, 0
    for at, character in enumerate(text):
        start = ends[-1] if ends else 0
        size = cell_len(character)
        if character == "\n":
            ends.append(at + 1)
            cells = behind_space = 0
            continue
        if character == " ":  # it may hang over: nobody sees it
            behind_space = at + 1
        elif cells + size > width and at > start:
            ends.append(behind_space if behind_space > start else at)
            cells = cell_len(text[ends[-1] : at])
        cells += size
    return ends


class Writing:
    """The picture of one answer, inside `with`."""

    def __init__(self, console: Console, text: Callable[[list[int]], str]) -> None:
        """text: token ids to text."""
        self.console, self.text = console, text
        self.mark = "░" if console.encoding.lower().startswith("utf") else "_"
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._printed = 0  # characters of the shown text
        self._finished = 0, ""  # the text of so many tokens
        self._began = self._drawn = time.perf_counter()

    def __enter__(self) -> Writing:
        self._live.start()
        self._live.update(Text("reading", style=QUIET), refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def read(self, so_far: PromptRead) -> None:
        """Draw how far the prompt is read."""
        self._live.update(
            Text(f"reading, {so_far.tokens:,} of {so_far.of:,} tokens", style=QUIET), refresh=True
        )

    def draft(self, draft: Draft) -> None:
        """Draw what a forward made of the answer, unless the last picture was just drawn."""
        now = time.perf_counter()
        if now - self._drawn < REFRESH_SEC:
            return
        self._drawn = now
        if len(draft.done) != self._finished[0]:
            self._finished = len(draft.done), shown(self.text(draft.done)).rstrip(BROKEN)
        self._scroll(self._finished[1])
        lines = self._lines(self._active(draft))
        filled = len(draft.done) + sum(token is not None for token in draft.block)
        figures = (
            f"{so_many(filled, 'token')}, {filled / (now - self._began):.0f} tokens/s ·"
            f" {filled / draft.forwards:.1f} tokens per forward · {so_many(draft.forwards, 'forward')}"
        )
        room = max(1, self.console.height - BELOW)
        picture = Group(*lines[-room:], Text(figures, style=QUIET, no_wrap=True, overflow="ellipsis"))
        self._live.update(picture, refresh=True)

    def answer(self, answer: Answer) -> None:
        """Leave the whole answer on the screen, and its figures below."""
        self._live.update(Text(), refresh=True)
        rest = Text(shown(answer.text)[self._printed :])
        for line in self._lines(rest) if rest.plain.strip() else []:
            self._print(line)
        self._print(Text(figures_of(answer), style=QUIET))

    def _scroll(self, final: str) -> None:
        """Print the lines that are whole and final."""
        rest = final[self._printed :]
        for line in self._lines(Text(rest))[:-1]:
            self._print(line)
        self._printed += [0, *line_ends(rest, self._width)][-1]

    def _active(self, draft: Draft) -> Text:
        """What is not printed yet: the last line, and the active block."""
        block = list(zip(draft.block, draft.is_edited, strict=True))
        plain = next((at for at, (token, edit) in enumerate(block) if token is None or edit), len(block))
        seen = [*draft.done, *(token for token, _ in block[:plain] if token is not None)]
        text = Text(shown(self.text(seen)).rstrip(BROKEN)[self._printed :])
        for (is_masked, is_edited), run in groupby(block[plain:], lambda each: (each[0] is None, each[1])):
            pairs = list(run)
            if is_masked:
                text.append(self.mark * len(pairs), style=MASKED)
                continue
            tokens = [token for token, _ in pairs if token is not None]
            before = self.text(seen[-1:])  # some tokenizers leave out the space that begins a text
            part = shown(self.text(seen[-1:] + tokens)[len(before) :]).strip(BROKEN)
            text.append(part, style=EDITED if is_edited else "")
            seen = tokens
        return text

    @property
    def _width(self) -> int:
        return max(2, self.console.width - 1)  # terminals differ in the width of some characters

    def _lines(self, text: Text) -> list[Text]:
        lines = list(text.divide(line_ends(text.plain, self._width)))
        for line in lines:
            line.rstrip()
        return lines

    def _print(self, line: Text) -> None:
        self.console.print(line, no_wrap=True, overflow="ignore", crop=False, highlight=False)


def figures_of(answer: Answer) -> str:
    """A turn's figures, and why it ended unless the model ended it."""
    why = {"end": "", "length": "as long as it may be", "context": "the context is full, /reset begins anew"}
    parts = [
        f"{so_many(answer.tokens, 'token')}, {answer.tokens_per_sec:.0f} tokens/s",
        f"{answer.tokens_per_forward:.1f} tokens per forward",
        so_many(answer.forwards, "forward"),
        f"{answer.shared} reused" if answer.shared else "",
        why.get(answer.stop, answer.stop),
    ]
    return " · ".join(part for part in parts if part)
