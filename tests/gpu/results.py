"""A plugin for pytest, `-p tests.gpu.results --results FILE`: a line of JSON for each test when it is done.

The first line names all tests that were chosen, so that a run which is ended tells which it did not reach.
"""

import json
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, required=True)


class Results:
    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, line: dict[str, Any]) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.write({"chosen": [item.nodeid for item in session.items]})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        why = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            why = report.longrepr[2].removeprefix("Skipped: ")
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = crash.message if crash else str(report.longrepr)
        line = {"test": report.nodeid, "outcome": report.outcome, "sec": round(report.duration, 2)}
        self.write(line | {"why": why[:2000]})


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--results")
    file.unlink(missing_ok=True)
    config.pluginmanager.register(Results(file))
