"""The day without a device: what it writes, how it ends a step, and what its page says of tests."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from llada_megatron.observe.parts import Facts, Paragraph, to_markdown
from tests.gpu import figures
from tests.gpu.day import STEPS, Step, figures_of, run
from tests.gpu.wheels import ROOT, locked, wanted

PYTHON = [sys.executable, "-c"]


def test_without_a_device_every_step_is_named_with_the_reason_and_nothing_fails(tmp_path):
    command = ["bash", ROOT / "launch" / "gpu_day.sh", "--python", sys.executable, "--out", tmp_path, "--dry"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "day.json").read_text())["steps"]
    assert [step["name"] for step in steps] == [step.name for step in STEPS]
    assert {(step["state"], step["why"]) for step in steps} == {("left out", "--dry")}
    page = (tmp_path / "index.html").read_text()
    assert all(f"<h2>{step.name}</h2>" in page for step in STEPS)
    assert done.stdout.count("would run") == len(STEPS)


def test_a_step_that_needs_more_than_its_time_is_ended_with_all_that_it_started(tmp_path):
    child = "import subprocess, time; c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True)"
    command = [*PYTHON, f"{child}; time.sleep(60)"]
    began = time.monotonic()
    result = run(Step("long", "", 1, []), tmp_path, command, limit_sec=1.0)
    assert result.state == "ended" and time.monotonic() - began < 20
    pid = (tmp_path / "log.txt").read_text().split()[0]
    status = Path("/proc") / pid / "status"
    assert not status.exists() or "(zombie)" in status.read_text()


def test_a_step_fails_by_an_exit_code_that_it_does_not_allow(tmp_path):
    command = [*PYTHON, "import sys; sys.exit(1)"]
    assert run(Step("one", "", 1, []), tmp_path, command, 20.0).state == "failed"
    assert run(Step("one", "", 1, [], passes=(0, 1)), tmp_path, command, 20.0).state == "passed"


def test_the_page_tells_tests_that_failed_were_left_out_and_were_not_reached(tmp_path):
    (tmp_path / "test_four.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_absent(): pytest.importorskip('no_such_package')\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_last(): pass\n"
    )
    plugin = ["-p", "tests.gpu.results", "--results", str(tmp_path / "tests.jsonl"), "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", *plugin, str(tmp_path / "test_four.py")]
    subprocess.run(command, env=environment, capture_output=True)
    facts, *tables = figures.tests(tmp_path)
    assert isinstance(facts, Facts)
    assert facts.rows == [("passed", "1"), ("failed", "1"), ("skipped", "1"), ("not reached", "1")]
    said = to_markdown(tables)
    assert "test_bad | assert 1 == 2" in said and "no_such_package" in said and "| 1 | test_last |" in said
    (tmp_path / "tests.jsonl").write_text('{"chosen": ["test_')
    (said,) = figures_of(Step("tests", "", 1, [], figures.tests), tmp_path)
    assert isinstance(said, Paragraph)


def test_wheels_hold_what_the_package_and_its_tests_import_and_no_torch():
    names = wanted()
    assert {"megatron-core", "hydra-core", "numpy", "pytest", "hypothesis"} <= names
    assert not any(name.startswith(("torch", "nvidia", "triton", "cuda")) for name in names)
    kept = locked((ROOT / "requirements.txt").read_text().splitlines(), names)
    assert len({line.split("==")[0].strip() for line in kept.splitlines() if line[:1].isalnum()}) == len(
        names
    )
    assert "--hash=sha256:" in kept
