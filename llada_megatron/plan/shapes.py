"""Sizes of one micro-batch on one process: what memory, traffic and time are all counted in."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llada_megatron.config.flops import (
    DocumentLengths,
    pairs_per_sequence,
    read_before_per_sequence,
    supervised_per_sequence,
)
from llada_megatron.config.last_layer import last_rows_per_token
from llada_megatron.config.objectives import RowBytes
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config, LayoutConfig

BYTES = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True)
class Shape:
    """One micro-batch on one process, in one stage of the schedule."""

    rows: int
    """S: rows of the hidden states before sequence parallelism splits them: (2)L micro_batch / cp."""
    tokens: int
    """t = S / tp: rows between the attention and MLP parts of a layer, where sequence parallelism is on."""
    sent: int
    """Copies of its tokens that the process sends to experts: t experts_per_token."""
    routed: int
    """N: copies that arrive at its experts, on the process with the most."""
    supervised: int
    """n: rows that the head is applied to."""
    keys: int
    """Keys that its queries meet after context parallelism's exchange."""
    gathered: int
    """Rows that the exchange's all-gather delivers; 0 without context parallelism."""
    halo: int
    """Noisy rows of this process that travel."""
    rotary_rows: int
    """Rows of the rotary angles."""
    sums: int
    """Numbers that the objective adds up over the global batch."""
    pairs: float
    """Visible query-key pairs of one layer, per head."""
    row_bytes: RowBytes
    """Of each supervised row."""
    halved_rows: int = 0
    """Of `rows` those of one sequence where they are `[x_t ; x_0]`; 0: there is no clean half."""
    block_bits: int = 0
    """w: of the number of a row's block, where blocks share pools of experts (model/pools.py)."""
    blocks: int = 0
    """P: numbers of blocks of a micro-batch, on every process."""
    supervised_before: int = 0
    """n of a pass before the step's own."""
    sums_before: tuple[int, ...] = ()
    """`row_bytes.sums` of such a pass."""
    samples: int = 1
    """The most sequences of a micro-batch in any stage of the schedule."""
    last_rows: int = 0
    """Of `rows` those that go on behind the last layer's attention; 0: all."""
    experts_on_node: int = 0
    """Ranks of an expert-parallel group (with etp) on one node; 0: all."""

    @property
    def before(self) -> Shape:
        """The micro-batch in a pass before the step's own, whose head may read something else."""
        row_bytes = replace(self.row_bytes, sums=self.sums_before)
        return replace(self, supervised=self.supervised_before, row_bytes=row_bytes)

    @property
    def behind_last(self) -> Shape:
        """The micro-batch behind the last layer's attention."""

        def going_on(count: int) -> int:
            return -(-count * self.last_rows // self.rows)

        if self.last_rows in (0, self.rows):
            return self
        return replace(
            self,
            last_rows=0,
            rows=going_on(self.rows),
            tokens=going_on(self.tokens),
            sent=going_on(self.sent),
            routed=going_on(self.routed),
        )


def shape_of(
    config: Config,
    layout: LayoutConfig,
    stage: Stage,
    *,
    expert_imbalance: float,
    documents: DocumentLengths | None = None,
) -> Shape:
    """Sizes under `layout` (which need not be config.layout) in a stage of the schedule.

    expert_imbalance: tokens that the busiest process's experts receive, over the mean. It matters only
    where experts are spread over processes: otherwise each token's copies stay, and their number is fixed.
    documents: of packed sequences; without them each is one document.
    """
    length, model, cp = stage.sequence_length, config.model, layout.cp
    rows = stage.rows_per_token * length * stage.micro_batch // cp
    tokens = rows // layout.tp
    sent = tokens * model.experts_per_token
    routed = sent * layout.etp * (expert_imbalance if layout.ep > 1 else 1.0)
    data = length * stage.micro_batch
    noisy_keys, travelling = _noisy_keys(data, cp, stage)
    pairs = pairs_per_sequence(config, stage, documents)
    block_bits = (stage.rows_per_token * math.ceil(length / stage.block_size) - 1).bit_length()
    return Shape(
        rows=rows,
        tokens=tokens,
        sent=sent,
        routed=math.ceil(routed),
        supervised=math.ceil(supervised_per_sequence(config, stage) * stage.micro_batch / cp),
        keys=data + noisy_keys if cp > 1 else rows,
        gathered=data + travelling if cp > 1 else 0,
        halo=travelling // cp,
        rotary_rows=rows if cp > 1 else rows // stage.micro_batch,
        sums=stage.geometry.sums,
        pairs=pairs * stage.micro_batch / cp,
        row_bytes=stage.geometry.row_bytes,
        halved_rows=rows // stage.micro_batch if stage.clean_copy else 0,
        block_bits=block_bits,
        blocks=stage.micro_batch << block_bits,
        supervised_before=math.ceil(read_before_per_sequence(config, stage) * stage.micro_batch / cp),
        sums_before=stage.geometry.read_before.sums,
        samples=max(each.micro_batch or layout.micro_batch for each in config.schedule.stages),
        last_rows=rows // stage.rows_per_token * last_rows_per_token(config, layout, stage),
        experts_on_node=min(layout.ep * layout.etp, config.cluster.gpus_per_node or layout.processes),
    )


def keeps_blocks_whole(stage: Stage, cp: int) -> bool:
    """Whether every process gets whole blocks: where there are two or more for each (parallel/context.py)."""
    return 2 * stage.block_size * cp <= stage.sequence_length


def _noisy_keys(data: int, cp: int, stage: Stage) -> tuple[int, int]:
    """Noisy keys that a context-parallel process attends to, and noisy rows that are gathered.

    Its own and none where blocks stay whole, all of them where blocks are cut: an upper bound.
    """
    if not stage.clean_copy:
        return 0, 0
    return (data // cp, 0) if keeps_blocks_whole(stage, cp) else (data, data)
