"""A report's parts as Markdown and as a page."""

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from llada_megatron.observe.page import TIMES, to_html
from llada_megatron.observe.parts import (
    Decoded,
    Facts,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Progress,
    Span,
    Table,
    Verbatim,
    to_markdown,
)
from llada_megatron.observe.report import write_report
from tests.observe.runs import make_run

HOSTILE = "<script>alert(1)</script> & \"' onload=x"
VOID = {"meta", "img", "link"}


class Page(HTMLParser):
    """What a page consists of; fails where a tag is closed that is not open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.sources, self.tags, self.ids, self.alts = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]
        self.ids += [value for key, value in attributes if key == "id"]
        self.alts += [value for key, value in attributes if key == "alt"]
        assert not any(key.startswith("on") or key == "style" for key, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "synthetic_run"))


def test_the_page_is_balanced_and_loads_nothing_but_the_pictures_beside_it(written):
    page = Page(written.page.read_text())
    pictures = [source for source in page.sources if ".png" in source]
    assert len(pictures) == len(page.alts) == page.tags.count("img") == 5 and all(page.alts)
    assert all((written.page.parent / source.partition("?")[0]).is_file() for source in pictures)
    others = [source for source in page.sources if source not in pictures]
    assert all(source.startswith(("#", "data:")) for source in others)
    assert "script" not in page.tags


def test_links_lead_to_the_sections_and_headings_go_down_one_level_at_a_time(written):
    page = Page(written.page.read_text())
    assert {source[1:] for source in page.sources if source.startswith("#")} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    levels = [int(tag[1]) for tag in page.tags if tag in ("h1", "h2", "h3")]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_only_a_served_page_has_a_script_and_both_allow_nothing_from_outside(written):
    still, live = (to_html(written.parts, version) for version in (None, "1"))
    assert "script" in Page(live).tags and "script-src 'sha256-" in live and "connect-src 'self'" in live
    assert "script" not in Page(still).tags and "script-src" not in still
    for text in (still, live):
        assert "default-src 'none'" in text and "http:" not in text.replace("http://www.w3.org/2000/svg", "")


def test_text_of_a_run_cannot_break_either_format():
    hostile = [
        Heading(HOSTILE, 1),
        Paragraph(HOSTILE),
        Progress(0.5, HOSTILE),
        Facts([(HOSTILE, HOSTILE)]),
        Heading(HOSTILE),
        Table([HOSTILE], [[HOSTILE]]),
        Picture(HOSTILE, HOSTILE),
        Verbatim(HOSTILE + "</pre>"),
        Fold(HOSTILE, [Paragraph(HOSTILE)]),
        Decoded([Span(HOSTILE, 0.5, is_edited=True)]),
    ]
    page = to_html(hostile)
    assert "script" not in Page(page).tags and "&lt;script&gt;" in page
    parts = [Heading("<t>", 1), Table(["x|y"], [["<i>\nb"]]), Verbatim("```\n</pre>")]
    markdown = to_markdown(parts)
    assert "| x\\|y |" in markdown and "<i> b" in markdown and "````text\n```\n</pre>\n````" in markdown


def test_the_title_says_how_much_is_done_until_all_is():
    titles = [to_html([Heading("Run x", 1), Progress(done, "")]) for done in (0.384, 1.0)]
    assert "<title>38% Run x</title>" in titles[0] and "<title>Run x</title>" in titles[1]


def test_numbers_stand_to_the_right_and_what_is_given_is_not_coloured():
    page = to_html([Heading("x", 1), Table(["a", "b"], [["1.5 ± 0.1", "one"], ["not yet", "2"]])])
    assert '<th class="number">a</th><th>b</th>' in page and '<td class="number">not yet</td>' in page
    decided = [Span("given"), Span("first", 0.0), Span("last", 1.0), Span("new", 0.5, is_edited=True)]
    page = to_html([Heading("x", 1), Decoded(decided)])
    middle = f'<mark class="t{TIMES // 2}"><ins>new</ins></mark>'
    assert (
        f'<pre>given<mark class="t0">first</mark><mark class="t{TIMES - 1}">last</mark>{middle}</pre>' in page
    )
    assert "givenfirstlastnew" in to_markdown([Decoded(decided)])


def test_a_picture_s_address_changes_with_its_content(written, tmp_path):
    one = Picture.of(written.page.with_name("loss.png"), "x")
    assert one.size[0] == 1080 and one == Picture.of(written.page.with_name("loss.png"), "x")
    changed = Path(tmp_path, "loss.png")
    changed.write_bytes(written.page.with_name("loss.png").read_bytes() + b"\0")
    assert Picture.of(changed, "x").version != one.version
