"""Packages beside the environment, which `make test-slow` installs into folders of their own."""

import sys
from pathlib import Path
from typing import Any

import pytest

SMOLLM2 = Path(sys.prefix) / "smollm2"


def gguf() -> Any:
    """The package that writes and reads GGUF files; skips a test where it is not installed."""
    if str(SMOLLM2) not in sys.path:
        sys.path.append(str(SMOLLM2))
    return pytest.importorskip("gguf")
