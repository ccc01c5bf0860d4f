"""The one patch of megatron-core that every machine gets: its checkpoint writer reports over a plain queue.

The writer is a thread here (checkpoint/store.py). megatron-core's own queue lives in a process that is
spawned at the first save, which takes seconds and imports the main script again.
"""

from __future__ import annotations

import queue


def use_plain_queue() -> None:
    """Give the next save a queue of its own; AttributeError when megatron-core's has moved."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if not hasattr(filesystem_async, "_results_queue"):
        raise AttributeError(
            "megatron-core's filesystem_async has no _results_queue: install the pinned version."
        )
    filesystem_async._results_queue = queue.Queue()
