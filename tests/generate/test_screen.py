"""The picture of an answer: lines that scroll away are final; what a model writes moves no cursor."""

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from llada_megatron.generate.conversation import Answer, Draft
from llada_megatron.generate.screen import Writing, figures_of, line_ends, shown

TEXT = "The quick brown fox\n\njumps over 你好，世界 and averylongwordwithoutanyspace 🙂🙂 e\u0301nd  of it"


def decode(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def parts(text: str, ends: list[int]) -> list[str]:
    return [text[first:last] for first, last in zip([0, *ends], [*ends, len(text)], strict=True)]


@pytest.mark.parametrize("width", [2, 5, 12, 80])
def test_lines_are_never_wider_and_more_text_changes_none_of_them(width):
    ends = line_ends(TEXT, width)
    assert all(cell_len(line.rstrip(" \n")) <= width for line in parts(TEXT, ends))
    for length in range(len(TEXT)):
        found = line_ends(TEXT[:length], width)
        assert found == ends[: len(found)]


def test_lines_end_behind_spaces_and_line_breaks():
    assert parts(TEXT, line_ends(TEXT, 12))[:4] == ["The quick ", "brown fox\n", "\n", "jumps over "]


def test_what_a_model_writes_moves_no_cursor():
    assert shown("a\x1b[2Jb\r\nc\x07\x9b\u202ed\te\x7f") == "a␛[2Jb\nc␇\ufffdd    e\ufffd"


def written(drafts: list[Draft], answer: Answer, *, size: tuple[int, int] = (30, 8)) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=size[0], height=size[1], highlight=False)
    with Writing(console, decode) as writing:
        for draft in drafts:
            writing._drawn = 0.0  # no picture is left out for coming too early
            writing.draft(draft)
        writing.answer(answer)
    return out.getvalue()


def answered(text: str, **changes) -> Answer:
    return Answer(
        **(
            {
                "text": text,
                "tokens": len(text.encode()),
                "stop": "end",
                "denoised": 4,
                "forwards": 5,
                "shared": 0,
                "seconds": 2.0,
            }
            | changes
        )
    )


def after_the_last_picture(output: str) -> list[str]:
    """What stays on a screen: rows that were not drawn over."""
    rows, at = [""], 0
    for piece in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", output):
        if piece == "\n":
            at += 1
            rows += [""] * (at + 1 - len(rows))
        elif piece.endswith("A") and piece.startswith("\x1b"):
            at -= int(piece[2:-1] or 1)
        elif piece == "\x1b[2K":
            rows[at] = ""
        elif not piece.startswith(("\x1b", "\r")):
            rows[at] += piece
    return rows


def test_masked_filled_and_edited_positions_are_told_apart():
    draft = Draft(list(b"It is "), [ord("b"), None, None, ord("g"), ord("!")], [False] * 3 + [True, False], 2)
    output = written([draft], answered("It is big!"))
    assert "It is b\x1b[2m░░\x1b[0m\x1b[4;33mg\x1b[0m!" in output
    assert "8 tokens" not in output.rsplit("It is big!")[-1] and "9 tokens" in output


def test_the_whole_answer_stays_and_figures_below_it():
    ids = list(TEXT.encode())
    drafts = [
        Draft(ids[:done], [*ids[done : done + 2], None, None], [False] * 4, step + 1)
        for step, done in enumerate(range(0, len(ids), 4))
    ]
    rows = [row.rstrip() for row in after_the_last_picture(written(drafts, answered(TEXT)))]
    expected = [line.rstrip() for line in parts(TEXT, line_ends(TEXT, 29))]
    assert rows[: len(expected)] == expected
    assert rows[len(expected)].startswith(f"{len(ids)} tokens, ")


def test_a_picture_has_no_empty_rows_of_its_own():
    draft = Draft([], [*b"ab", None, *b"c\nd"], [False] * 6, 1)
    assert "ab\x1b[2m░\x1b[0mc\nd\n" in written([draft], answered("abxc\nd"))


def test_half_a_character_is_not_shown_until_it_is_whole():
    ids = list("好".encode())
    output = written([Draft([], [*ids[:2], None], [False] * 3, 1)], answered("好"))
    assert "\ufffd" not in output and "░" in output


def test_figures_say_why_an_answer_ends_unless_the_model_ended_it():
    assert figures_of(answered("abcd")) == "4 tokens, 2 tokens/s · 1.0 tokens per forward · 5 forwards"
    for stop, said in (("stopped", "stopped"), ("context", "/reset begins anew"), ("length", "as long as")):
        assert said in figures_of(answered("a", stop=stop))
    assert "32 reused" in figures_of(answered("a", shared=32))
