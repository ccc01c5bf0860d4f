"""What checkpoints cost: bytes and host memory of a save, seconds that training waits, seconds of a load.

Every process writes its share of the weights and its run of the optimizer's state (checkpoint/store.py), so a
closed form is enough. Weights that several tensor-parallel ranks hold alike are counted for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llada_megatron.config.contents import Parameters
from llada_megatron.config.layout import data_parallel_size, expert_data_parallel_size
from llada_megatron.config.quantities import GB
from llada_megatron.config.schema import Config, LayoutConfig
from llada_megatron.plan.memory import padded_buffers

STATE_BYTES = 12
"""Per element: an fp32 master and two fp32 moments, of fp32 weights too."""
AVERAGE_BYTES = 4
"""Per element, with training.ema_decay."""
HASH_GB_PER_SEC = 1.0
"""SHA-256 of one thread while it writes or reads; 2.1 was measured on a core with SHA instructions."""
HASH_THREADS = 4
"""Of a load; checkpoint/publish.py."""
INDEX_SEC = 5.0
"""While the first rank writes the index, and each reads it: of 100,000 parts 3.5 and 4.6 s on a busy core."""


@dataclass(frozen=True)
class Checkpoints:
    """Of one layout; seconds are None where the cluster does not say how fast hosts or storage are."""

    bytes: int
    host_bytes_per_node: int
    """What a save holds in host memory; 0 where it writes from where tensors lie."""
    memory_bytes_per_node: int
    """What copies in memory take at their peak, when a new one is complete and the one before still there."""
    in_background: bool
    copy_seconds: float | None
    write_seconds: float | None
    load_seconds: float | None

    @property
    def wait_seconds(self) -> float | None:
        """Of training, for one save."""
        if self.copy_seconds is None or self.write_seconds is None:
            return None
        return self.copy_seconds + INDEX_SEC + (0 if self.in_background else self.write_seconds)


def checkpoints_of(
    config: Config, layout: LayoutConfig, held: Sequence[Parameters], *, b: int
) -> Checkpoints:
    """b: bytes of a weight; held: by pipeline rank.

    Each process copies at cluster.host_gb_per_sec; a node writes or reads at cluster.storage_gb_per_sec while
    all nodes do, its processes hashing meanwhile. A load hashes every file and then reads it; in the layout
    that saved the second time from the node's memory, which is not counted, in another one it is.
    """
    cluster = config.cluster
    state = STATE_BYTES + (AVERAGE_BYTES if config.training.ema_decay else 0)
    shares = [_share_bytes(one, layout, b=b, state=state) for one in held]
    per_node = cluster.gpus_per_node or 1
    largest, total = max(shares), sum(shares) * layout.processes // layout.pp
    asked = config.checkpoint.in_background
    in_background = cluster.has_gpus if asked is None else asked
    staged = largest if in_background or cluster.has_gpus else 0
    copy = write = load = None
    if cluster.host_gb_per_sec:
        copy = staged / (cluster.host_gb_per_sec * GB)
    if cluster.storage_gb_per_sec:
        moved = largest * per_node / (cluster.storage_gb_per_sec * GB)
        threads = config.checkpoint.writer_threads
        write = max(moved, largest / (threads * HASH_GB_PER_SEC * GB))
        load = max(moved, largest / (HASH_THREADS * HASH_GB_PER_SEC * GB)) + INDEX_SEC
    remembered = largest * per_node if config.checkpoint.memory_every_steps else 0
    with_peer = 2 if layout.processes > per_node else 1
    return Checkpoints(total, staged * per_node, 2 * with_peer * remembered, in_background, copy, write, load)


def _share_bytes(held: Parameters, layout: LayoutConfig, *, b: int, state: int) -> int:
    """What one process writes; state: bytes per element that it trains, beside the weight's b."""
    dense, expert = padded_buffers(held, layout)
    replicas = data_parallel_size(layout) * layout.cp
    own = dense // replicas + expert // expert_data_parallel_size(layout)
    return (state + b) * own + b * held.frozen // replicas
