"""What a report is made of, and its Markdown; page.py makes a page of the same parts."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

NOT_YET = "not yet"


@dataclass
class Heading:
    """Of level 2, it opens a section; the one of level 1 names the report."""

    text: str
    level: int = 2


@dataclass
class Paragraph:
    text: str


@dataclass
class Progress:
    """How much of something is done, 0 to 1."""

    done: float
    text: str


@dataclass
class Facts:
    """Names and values: few, and read first."""

    rows: list[tuple[str, str]]


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass
class Picture:
    """A PNG beside the report."""

    file: str
    caption: str
    size: tuple[int, int] | None = None
    """Pixels; a page that knows them does not jump when the picture comes."""
    version: str = ""
    """Of the content: a page that is shown asks for a picture again where this changes."""

    @classmethod
    def of(cls, path: Path, caption: str) -> Picture:
        """The picture at a path beside the report."""
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])  # IHDR comes first
        return cls(path.name, caption, (width, height), f"{zlib.crc32(content):08x}")


@dataclass
class Verbatim:
    text: str


@dataclass
class Span:
    """A piece of a decoded text."""

    text: str
    decided: float | None = None
    """When its tokens were decided, 0 (first) to 1 (last); None: they were given."""
    is_edited: bool = False
    """It replaced what had been decided before."""


@dataclass
class Decoded:
    """A text whose pieces were decided one after the other."""

    spans: list[Span]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Decoded | None:
        """A record's `pieces`, one per token, coloured by the forward that decided each (`decided_at`, 0:
        given), those that `is_edited` says replaced underlined. None of an older record, which does not say.
        """
        pieces, decided_at = record.get("pieces", []), record.get("decided_at", [])
        if not pieces or len(pieces) != len(decided_at):
            return None
        edited = record.get("is_edited") or [False] * len(pieces)
        last = max(max(decided_at), 2)
        return cls(
            [
                Span("".join(piece for piece, _, _ in run), (at - 1) / (last - 1) if at else None, is_edited)
                for (at, is_edited), run in groupby(
                    zip(pieces, decided_at, edited, strict=True), key=lambda token: (token[1], bool(token[2]))
                )
            ]
        )


@dataclass
class Fold:
    """Parts that a page shows when somebody asks for them."""

    text: str
    parts: list[Part]


Part = Heading | Paragraph | Progress | Facts | Table | Picture | Verbatim | Decoded | Fold


LEGEND: list[Part] = [
    Paragraph("Tokens have the colour of the forward that decided them, replaced ones are underlined:"),
    Decoded(
        [
            *(Span(text, place / 4) for place, text in enumerate(("first", " ", "later", " ", "last"))),
            Span(" "),
            Span("replaced", 1.0, is_edited=True),
        ]
    ),
]


def plus_minus(estimate: Mapping[str, Any] | None, absent: str = NOT_YET) -> str:
    """A cell of an estimate's `mean` and `se`."""
    if estimate is None:
        return absent
    if estimate["mean"] is None:
        return "not finite"
    return f"{estimate['mean']:.4f}" + ("" if estimate["se"] is None else f" ± {estimate['se']:.4f}")


def title_of(parts: list[Part]) -> str:
    """The text of the first heading."""
    return next(part.text for part in parts if isinstance(part, Heading))


def to_markdown(parts: list[Part]) -> str:
    """The parts as Markdown (GitHub's, for the tables)."""
    return "\n\n".join(_markdown(part) for part in parts) + "\n"


def _markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Paragraph(text) | Progress(_, text):
            return text
        case Facts(rows):
            return _markdown(Table(["", ""], [list(row) for row in rows]))
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)
        case Picture(file=file, caption=caption):
            return f"![{caption}]({file})\n\n{caption}"
        case Verbatim(text):
            longest = max((len(ticks) for ticks in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{text}\n{fence}"
        case Fold(text, inside):
            return to_markdown([Heading(text, 3), *inside]).rstrip()
        case Decoded(spans):
            return _markdown(Verbatim("".join(span.text for span in spans)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
