"""Tasks as `llada eval` loads them."""

from pathlib import Path
from typing import Any

from llada_megatron.harness import tasks


def load(*names: str, folder: Path | None = None) -> dict[str, Any]:
    """lm-eval's tasks by name, of the package and of a folder."""
    return tasks.load(names, [folder] if folder else [], fewshot=None)["tasks"]
