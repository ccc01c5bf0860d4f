"""A report's parts as one HTML page: nothing from outside, light and dark, wide and narrow.

The page of a server (server.py) also refreshes itself; a page that is opened as a file has no script at all.
"""

from __future__ import annotations

import hashlib
import html
import re
from base64 import b64encode

from llada_megatron.observe.parts import (
    Decoded,
    Facts,
    Fold,
    Heading,
    Paragraph,
    Part,
    Picture,
    Progress,
    Span,
    Table,
    Verbatim,
    title_of,
)

CSS = """
:root { color-scheme: light dark; --line: #8884; --accent: #0072b2; }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1, h2, h3 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { margin: 0 0 .3em; }
h2 { margin: 2.2em 0 .6em; padding-top: .6em; border-top: 1px solid var(--line); }
h3 { margin: 1.6em 0 .4em; }
p { overflow-wrap: anywhere; }
a { color: LinkText; }
nav { display: flex; flex-wrap: wrap; gap: .4em 1.2em; margin: 1.2em 0; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
details { margin: .6em 0; }
#status { min-height: 1.5em; margin: 0; font-size: .9em; opacity: .75; }
progress { width: 100%; height: 1.1rem; accent-color: var(--accent); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .7rem; margin: 1em 0; }
dl div { border: 1px solid var(--line); border-radius: 6px; padding: .5em .8em; }
dt { font-size: .85em; opacity: .75; }
dd { margin: 0; font-weight: 600; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1em 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3em 1.2em .3em 0; text-align: left; vertical-align: top; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
tr > :first-child { position: sticky; left: 0; background: Canvas; max-width: 11rem; white-space: normal; }
td.long { white-space: normal; min-width: 18rem; overflow-wrap: anywhere; }
.number { text-align: right; }
figure { margin: 1.5em 0; }
img { display: block; width: 100%; min-width: 36rem; max-width: 60rem; height: auto; border-radius: 6px; }
figcaption { opacity: .75; font-size: .9em; margin-top: .4em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: .4em 0 1em; }
pre { padding: .7em 1em; border: 1px solid var(--line); border-radius: 6px; font-size: .9em; }
mark { color: inherit; border-radius: 2px; }
ins { text-decoration: underline 2px; text-underline-offset: 3px; }
.t0 { background: #44015455; } .t1 { background: #41448766; } .t2 { background: #2a788e66; }
.t3 { background: #22a88466; } .t4 { background: #7ad15166; } .t5 { background: #fde72566; }
@media (prefers-color-scheme: dark) { img { filter: invert(.92) hue-rotate(180deg); } }
""".strip()

SCRIPT = """
const status = document.getElementById("status"), wait_ms = 2000;
let shown = document.body.dataset.version;
async function ask(name) {
  const answer = await fetch(name, {cache: "no-store"});
  if (!answer.ok) throw new Error(answer.status);
  return answer;
}
async function show() {
  const page = new DOMParser().parseFromString(await (await ask("index.html")).text(), "text/html");
  const news = [];
  for (const section of page.querySelectorAll("section")) {
    const old = document.getElementById(section.id);
    if (old && old.innerHTML !== section.innerHTML) news.push([old, document.importNode(section, true)]);
  }
  const pictures = news.flatMap(([, fresh]) => [...fresh.querySelectorAll("img")]);
  await Promise.all(pictures.map(picture => picture.decode().catch(() => {})));
  for (const [old, fresh] of news) old.replaceWith(fresh);
  document.title = page.title;
  shown = page.body.dataset.version;
}
async function refresh() {
  let going = true;
  try {
    const state = await (await ask("state.json")).json();
    if (state.version !== shown) await show();
    going = state.going;
    status.textContent = state.problem || (going ? "This page refreshes itself." : "");
  } catch {
    status.textContent = "The server does not answer: this page is as it was then.";
  }
  if (going) setTimeout(refresh, wait_ms);
}
refresh();
""".strip()

ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 4 4'%3E"
    "%3Cpath fill='%230072b2' d='M0 0h4v4H0z'/%3E"
    "%3Cpath fill='%23e69f00' d='M2 0h1v1H2zM1 1h1v1H1zM3 2h1v1H3zM0 3h1v1H0z'/%3E%3C/svg%3E"
)
"""Some of its squares are still masked."""
TIMES = 6
"""Colours of CSS for when a token was decided."""
LONG = 48
"""Characters of a cell from which on its column is broken into lines."""
NUMBER = re.compile(r"[-+]?[\d.,]+( ± [\d.]+)?( ?(%|[kMBT]|s|min|h))?|-|not yet")


def to_html(parts: list[Part], version: str | None = None) -> str:
    """The parts as one page; the first heading is its title.

    version: of a page that is served; it asks its server for a newer one.
    """
    title = title_of(parts)
    done = next((part.done for part in parts if isinstance(part, Progress)), 1.0)
    if done < 1:
        title = f"{done:.0%} {title}"
    sources = ["default-src 'none'", "img-src 'self' data:", f"style-src {_hash(CSS)}"]
    sources += ["base-uri 'none'", "form-action 'none'"]
    status = script = data = ""
    if version is not None:
        sources += [f"script-src {_hash(SCRIPT)}", "connect-src 'self'"]
        status, data = '<p id="status" role="status"></p>\n', f' data-version="{html.escape(version)}"'
        script = f"<script>\n{SCRIPT}\n</script>\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{"; ".join(sources)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="{ICON}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{CSS}\n</style>\n</head>\n<body{data}>\n"
        f"{status}<main>\n{_sections(parts)}</main>\n{script}</body>\n</html>\n"
    )


def _hash(content: str) -> str:
    digest = hashlib.sha256(f"\n{content}\n".encode()).digest()
    return f"'sha256-{b64encode(digest).decode()}'"


def _sections(parts: list[Part]) -> str:
    """A section for what comes first, with links to the others, and one for each heading of level 2."""
    starts = [index for index, part in enumerate(parts) if isinstance(part, Heading) and part.level == 2]
    first, *others = [parts[a:b] for a, b in zip([0, *starts], [*starts, len(parts)], strict=True)]
    links = "".join(f'<a href="#{_id(part)}">{html.escape(title_of(part))}</a>' for part in others)
    nav = f"<nav>{links}</nav>\n" if links else ""
    text = f'<section id="first">\n{_body(first)}</section>\n{nav}'
    return text + "".join(f'<section id="{_id(part)}">\n{_body(part)}</section>\n' for part in others)


def _id(section: list[Part]) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title_of(section).lower()).strip("-")


def _body(parts: list[Part]) -> str:
    return "".join(f"{_html(part)}\n" for part in parts)


def _html(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Progress(done, text):
            bar = f'<progress value="{done:.4f}" max="1" aria-label="{html.escape(text)}"></progress>'
            return f"<p>{html.escape(text)}</p>\n{bar}"
        case Facts(rows):
            pairs = (f"<div><dt>{html.escape(a)}</dt><dd>{html.escape(b)}</dd></div>" for a, b in rows)
            return f"<dl>{''.join(pairs)}</dl>"
        case Table(header, rows):
            kinds = [_kind(list(column)) for column in zip(*rows, strict=True)] or [""] * len(header)
            head = f"<thead>{_row('th', header, kinds)}</thead>" if any(header) else ""
            body = "".join(_row("td", row, kinds) for row in rows)
            return f'<div class="wide"><table>{head}<tbody>{body}</tbody></table></div>'
        case Picture(file, caption, size, version):
            text = html.escape(caption)
            source = html.escape(file) + (f"?{version}" if version else "")
            pixels = f' width="{size[0]}" height="{size[1]}"' if size else ""
            image = f'<div class="wide"><img src="{source}" alt="{text}"{pixels}></div>'
            return f"<figure>{image}<figcaption>{text}</figcaption></figure>"
        case Verbatim(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Fold(text, inside):
            return f"<details><summary>{html.escape(text)}</summary>\n{_body(inside)}</details>"
        case Decoded(spans):
            return f"<pre>{''.join(map(_span, spans))}</pre>"


def _span(span: Span) -> str:
    text = html.escape(span.text)
    if span.is_edited:
        text = f"<ins>{text}</ins>"
    if span.decided is None:
        return text
    return f'<mark class="t{min(TIMES - 1, int(span.decided * TIMES))}">{text}</mark>'


def _kind(column: list[str]) -> str:
    """How a table's column is set: numbers to the right, long texts in lines."""
    if all(NUMBER.fullmatch(cell) for cell in column) and any(cell[:1].isdigit() for cell in column):
        return "number"
    return "long" if max(map(len, column)) > LONG else ""


def _row(tag: str, cells: list[str], kinds: list[str]) -> str:
    opened = (f'<{tag} class="{kind}">' if kind else f"<{tag}>" for kind in kinds)
    row = (f"{start}{html.escape(cell)}</{tag}>" for start, cell in zip(opened, cells, strict=True))
    return f"<tr>{''.join(row)}</tr>"
