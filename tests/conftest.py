"""What every test gets: GPU tests skip without a GPU, and hypothesis never judges by the clock."""

from functools import cache

import pytest
from hypothesis import settings

# A shared machine stalls now and then; a deadline would call that a failure.
settings.register_profile("llada", deadline=None)
settings.load_profile("llada")


@cache
def has_gpu() -> bool:
    import torch  # here, since it takes seconds and most selections hold no GPU test

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs a CUDA device")
