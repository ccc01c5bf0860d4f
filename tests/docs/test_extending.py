"""The worked examples of docs/extending.md run, and the files and links that the documents name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
EXAMPLE = re.compile(
    r"^<!-- example: ([^\n]+) -->\n<!-- run -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL
)
EXAMPLES = dict(EXAMPLE.findall(PAGE))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_block_that_shall_run_is_found_under_a_name_of_its_own():
    assert len(EXAMPLES) == PAGE.count("<!-- run -->") >= 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs_and_checks_itself(name, tmp_path, monkeypatch):
    source = EXAMPLES[name]
    assert re.search(r"\bassert|\bassert_close\(", source)
    monkeypatch.chdir(tmp_path)
    exec(compile(source, f"docs/extending.md: {name}", "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page):
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert not [link for link in links if not (page.parent / link).exists()]
