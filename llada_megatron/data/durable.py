"""Files that outlive a crash of the machine: written out before a rename makes them count."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path


def write_out(paths: Iterable[Path]) -> None:
    """Wait until files or folders are on disk; without it, a rename may survive a crash that they do not."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
