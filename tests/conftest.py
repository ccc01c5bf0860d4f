"""For every test: no GPU, no GPU tests; hypothesis never judges by the clock; files stay whole."""

import signal
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import settings

from tests.corpus import corpus

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


@cache
def has_gpu() -> bool:
    import torch  # here, since it takes seconds and most selections hold no GPU test

    return torch.cuda.is_available()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers (`pytest -n 2`) get whole files, which share fixtures; one gets all that share a Slurm."""
    from xdist.scheduler import LoadFileScheduling

    class WholeFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "slurm" if file.startswith("tests/slurm/") else file

    return WholeFiles(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")
