"""The page in a real browser: as a file, and served while its run goes on."""

import json
import threading
from pathlib import Path

import pytest

from llada_megatron.config.quantities import short_count
from llada_megatron.observe.report import write_report
from llada_megatron.observe.server import LiveReport, Server
from llada_megatron.record.run_dir import RunDir
from tests.observe.browser import PROGRAMS, chromium, program
from tests.observe.runs import SCHEDULE, make_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(program() is None, reason=f"needs a browser: {' or '.join(PROGRAMS)}"),
]
ROWS = "[...document.querySelectorAll('#{} table')].map(t => [...t.rows].map(r => r.innerText.split('\\t')))"
FACTS = "Object.fromEntries([...document.querySelectorAll('dl div')].map(e => e.innerText.split('\\n')))"
PICTURES = "[...document.images].map(image => image.naturalWidth)"
SHAPE = "[document.documentElement.scrollWidth, innerWidth]"
SCHEDULED = sum(count for *_, count in SCHEDULE)
PHONE, DESK = 390, 1280


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("finished") / "run")
    write_report(run_dir)
    return run_dir


def tables(tab, section):
    """The tables of a section: cells by the first one of each row."""
    return [{row[0]: row[1:] for row in table} for table in tab.value(ROWS.format(section))]


def check_numbers(tab, run_dir: Path):
    """What the page shows is what report.json says."""
    report = json.loads(RunDir(run_dir).report_json.read_text())
    now, facts = report["progress"], tab.value(FACTS)
    assert facts["step"] == f"{now['step']} of {now['steps']}"
    assert facts["tokens"] == f"{short_count(now['tokens'])} of {short_count(now['total_tokens'])}"
    assert facts["stage"] == f"{now['stage']}, block {now['block_size']}"
    assert facts["state"] == now["state"]
    rows, references, *_ = tables(tab, "likelihood-on-held-out-text")
    for stage in report["stages"]:
        shown = [f"{bound['mean']:.4f} ± {bound['se']:.4f}" for bound in stage["bound"].values()]
        assert shown == rows[stage["name"]][3 : 3 + len(shown)]
        assert rows[stage["name"]][:2] == [str(stage["block_size"]), short_count(stage["tokens"])]
    assert references["bigram entropy"] == [f"{report['baselines']['bigram']:.4f}"]
    [costs] = tables(tab, "cost")
    assert all(costs[name][0] == f"{hours:.4f}" for name, hours in report["cost"]["by_use"].items())


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_the_file_is_whole_and_quiet_and_as_wide_as_the_screen(tab, finished, width, dark):
    tab.screen(width, dark=dark)
    tab.open(RunDir(finished).report_page.as_uri())
    assert tab.value(SHAPE)[0] <= width
    assert tab.value(PICTURES) == [1080] * 5 and tab.complaints == []
    assert all(url.startswith(("file:", "data:")) for url in tab.requests) and len(tab.requests) >= 5
    check_numbers(tab, finished)
    inverted = tab.value("getComputedStyle(document.images[0]).filter").startswith("invert")
    assert inverted == dark


def test_a_served_page_follows_its_run_to_the_end_and_keeps_its_place(tab, tmp_path):
    run_dir = make_run(tmp_path / "run")
    files = RunDir(run_dir)
    lines = files.metrics.read_text().splitlines(keepends=True)
    files.metrics.write_text("".join(lines[:70]))
    files.checkpoints.rename(tmp_path / "kept")
    with Server(LiveReport(run_dir, rest=0.0), port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            tab.screen(PHONE)
            tab.open(server.url)
            assert f"70 of {SCHEDULED}" in tab.value("document.body.innerText")
            tab.value("scrollTo(0, 1500), document.querySelector('#samples').dataset.kept = 'yes'")
            files.metrics.write_text("".join(lines[:71]))
            tab.until(f"document.body.innerText.includes('71 of {SCHEDULED}')")
            assert tab.value("scrollY") == 1500
            assert tab.value("document.querySelector('#samples').dataset.kept") == "yes"  # nothing new there
            check_numbers(tab, run_dir)
            files.metrics.write_text("".join(lines))
            (tmp_path / "kept").rename(files.checkpoints)
            tab.until("document.body.innerText.includes('The schedule is complete')")
            tab.until("status.textContent === ''")
            check_numbers(tab, run_dir)
            assert tab.value(PICTURES) == [1080] * 5 and tab.value(SHAPE)[0] <= PHONE
            asked = len(tab.requests)
            tab.value("new Promise(done => setTimeout(done, 1.5 * wait_ms))")
            assert len(tab.requests) == asked and tab.complaints == []
            assert all(url.startswith((server.url, "data:")) for url in tab.requests)
        finally:
            server.shutdown()
            thread.join()
