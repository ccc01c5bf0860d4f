"""For every test: no GPU, no GPU tests; hypothesis never judges by the clock; files stay whole."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from tests.corpus import corpus

__all__ = ["corpus"]

# A shared machine stalls now and then; a deadline would call that a failure.
settings.register_profile("llada", deadline=None)
settings.load_profile("llada")


@cache
def has_gpu() -> bool:
    import torch  # here, since it takes seconds and most selections hold no GPU test

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Workers (`pytest -n 2 --dist loadgroup`) get whole files, which share fixtures; one gets the Slurm."""
    for item in items:
        room = item.path.parent
        group = room if room.name == "slurm" else item.path
        item.add_marker(pytest.mark.xdist_group(str(group.relative_to(Path(__file__).parent))))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")
