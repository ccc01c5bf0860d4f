"""One training per run directory."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from llada_megatron.config.errors import RunHeld
from llada_megatron.parallel.ranks import from_first_rank
from llada_megatron.record.run_dir import RunDir
from llada_megatron.runtime.launch import node

LINGER_SEC = 120.0
"""How long a lock may outlive its node: NFS and Lustre let go of it after 90 to 100 s."""


@contextmanager
def only_training_of(run_dir: Path, *, wait_sec: float = 0.0) -> Iterator[None]:
    """Rank 0 holds a lock on the run's directory; raises RunHeld, on every rank, where another holds it.

    The operating system lets go of it when rank 0 ends, however it ends; `wait_sec` is for one whose node has
    just gone. File systems without locks hold nothing back.
    """
    with ExitStack() as held:

        def holder() -> str:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = held.enter_context(open(RunDir(run_dir).lock, "a+", encoding="utf-8"))
            until = time.monotonic() + wait_sec
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    file.truncate(0)
                    file.write(f"process {os.getpid()} on {node()}")
                    file.flush()
                except BlockingIOError:
                    if time.monotonic() < until:
                        time.sleep(1)
                        continue
                    file.seek(0)
                    return file.read() or "another process"
                except OSError:  # no locks here, or no room for the name
                    pass
                return ""

        if other := from_first_rank(holder):
            raise RunHeld(
                f"{run_dir} is being trained by {other}: wait for it, stop it, or choose another run.dir."
            )
        yield
