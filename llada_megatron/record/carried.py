"""What came with a checkpoint's weights and stays with them: configurations, tokenizer, model code.

Every checkpoint made from those weights holds it in a folder `hf/`, by content, so that a run may be moved
and what it started from deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.record.manifest import Checkpoint, find

CARRIED = "hf"


def folder_of(checkpoint: Checkpoint) -> Path | None:
    """The folder of a checkpoint; of one that was saved before runs carried it, that of its run's origin."""
    folder = checkpoint.path / CARRIED
    if folder.is_dir():
        return folder
    origin = checkpoint.manifest.config.get("checkpoint", {}).get("init_from")
    if not origin:
        return None
    try:
        return folder_of(find(origin))
    except BadInput:  # it is no longer there
        return None


def content_of(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Every file that a checkpoint carries, by its path in the folder; empty where nothing came with it."""
    folder = folder_of(checkpoint)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder else []
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if folder}


def write(content: Mapping[str, bytes], checkpoint: Path) -> None:
    """Write the folder into a checkpoint that is being written; nothing where there is no content."""
    for name, data in content.items():
        path = checkpoint / CARRIED / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
