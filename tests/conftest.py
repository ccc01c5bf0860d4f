"""For every test: no GPU, no GPU tests; hypothesis never judges by the clock; files stay whole."""

import os
import signal
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import settings

from tests.corpus import corpus
from tests.distributed import run_ranks

__all__ = ["corpus"]

# A shared machine stalls now and then; a deadline would call that a failure.
settings.register_profile("llada", deadline=None)
settings.load_profile("llada")

# Tests send signals; `make test &` would ignore Ctrl-C, nohup SIGHUP, and so would what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def cache_of_data_sets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Not the user's; they read where it is when they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hugging_face"))
        yield


@pytest.fixture(scope="session", autouse=True)
def parent_of_ranks(request: pytest.FixtureRequest, cache_of_data_sets: None) -> None:
    """A worker's ranks are forked from one that has imported it all, whichever file starts ranks first."""
    if hasattr(request.config, "workerinput"):
        run_ranks(os.getpid)


@cache
def has_gpu() -> bool:
    import torch  # here, since it takes seconds and most selections hold no GPU test

    return torch.cuda.is_available()


LONGEST = [
    "slurm",
    "tests/commands/test_signals.py",
    "tests/verify/test_layouts.py",
    "tests/demo/test_pretrained.py",
    "tests/training/test_rollback.py",
    "tests/verify/test_mla_layouts.py",
    "tests/verify/test_resume.py",
    "tests/generate/test_decoder_layouts.py",
    "tests/tasks/test_humaneval.py",
]
"""Of few slow tests, that take long: workers start with them, and end with what is short."""


def scope_of(nodeid: str) -> str:
    """What one worker runs as a whole: a file, whose tests share fixtures, or all that shares a Slurm."""
    file = nodeid.partition("::")[0]
    return "slurm" if file.startswith("tests/slurm/") else file


@pytest.hookimpl(trylast=True)  # of those that are left
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):
        return
    tests = Counter(scope_of(item.nodeid) for item in items)
    places = {scope: place for place, scope in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(scope := scope_of(item.nodeid), len(LONGEST)), -tests[scope]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers (`pytest -n 2`) get whole files in the order of the collection, and the next one late."""
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return scope_of(nodeid)

        def _reschedule(self, node: Any) -> None:
            # xdist's own would have three tests wait for this worker while another one has nothing to do.
            if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return WholeFiles(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")
