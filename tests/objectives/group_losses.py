"""What a model loses where the blocks before its own are unfinished: for docs/results/multi_block.md.

    .venv/bin/python -m tests.objectives.group_losses BLOCK_SIZE RUN ...

Held-out text of each run, masked by chains of rates in groups of 2 and of 4 blocks, each layout once per
sequence and draw. A masked token is predicted twice: from noisy blocks of its group and the clean text before
the group, and as in decoding block by block from the clean text before its block. Masks are the same for all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from llada_megatron.config.multi_block import MultiBlockConfig
from llada_megatron.config.schema import Config, DiffusionConfig
from llada_megatron.objectives.batch import MicroBatch
from llada_megatron.objectives.corruption import Corruption
from tests.distributed import run_ranks

SEQUENCES, DRAWS, SEED = 64, 2, 0
Losses = dict[tuple[int, bool], list[float]]
"""By blocks of a group, and whether those before are noisy: nats per masked token by place in the group."""


def losses(config: Config, checkpoint: Path, block_size: int) -> Losses:
    """Of a checkpoint on the held-out text of its run."""
    from llada_megatron.checkpoint.load import load_model
    from llada_megatron.config import rules
    from llada_megatron.evaluate.held_out import HeldOut
    from llada_megatron.objectives import passes
    from llada_megatron.objectives.diffusion import Diffusion
    from llada_megatron.objectives.multi_block import corrupt_in_groups
    from llada_megatron.parallel import groups

    config = replace(config, evaluation=replace(config.evaluation, sequences=SEQUENCES))
    groups.initialize(config.layout)
    model, samples = load_model(config, checkpoint), HeldOut(config).samples
    objective = Diffusion("diffusion", config, rules.schedule_of(config))
    found: Losses = {}
    for size in (2, 4):
        settings = MultiBlockConfig(size)
        diffusion = DiffusionConfig(block_grid=config.diffusion.block_grid, multi_block=settings)
        layouts = [index for index, each in enumerate(settings.layouts) if each and each[0] == size]
        for noisy in (True, False):

            def batches(
                diffusion: DiffusionConfig = diffusion, layouts: list[int] = layouts, noisy: bool = noisy
            ) -> Iterator[MicroBatch]:
                every = len(diffusion.multi_block.layouts)
                for number, sample in enumerate(samples):
                    for draw, layout in np.ndindex(DRAWS, len(layouts)):
                        index = (number * DRAWS + draw) * every + layouts[layout]
                        arguments = SEED, index, sample.cu_seqlens, block_size, diffusion, sample.supervised
                        made = corrupt_in_groups(*arguments)
                        yield batch_of(objective, sample, made, block_size, noisy)

            sums = passes.forward_only(
                model,
                [batches()],
                by_place,
                num_microbatches=len(samples) * DRAWS * len(layouts),
                seq_length=2 * len(samples[0].tokens),
                micro_batch_size=1,
            )
            total, count = torch.stack(sums).sum(dim=0)
            found[size, noisy] = (total / count)[:size].tolist()
    return found


def batch_of(objective, sample, made: Corruption, block_size: int, noisy: bool) -> MicroBatch:  # type: ignore[no-untyped-def]
    """One masked sequence with its rows' places in their groups, which the model sees or does not."""
    assert made.group_starts is not None
    seen = made if noisy else Corruption(made.masked, made.rate)
    batch = objective.corrupted([sample], [seen], block_size)
    token = batch.inputs.outputs.numpy()
    place = (token - made.group_starts[token]) // block_size
    batch.rows["place"] = torch.from_numpy(place)
    return batch


def by_place(batch: MicroBatch, cross_entropy: torch.Tensor) -> torch.Tensor:
    """Sums and counts by place in the group, [2, 8]."""
    found = cross_entropy.new_zeros(2, 8, dtype=torch.float64)
    for row, values in zip(found, (cross_entropy, torch.ones_like(cross_entropy)), strict=True):
        row.index_add_(0, batch.rows["place"], values.double())
    return found


def main(block_size: int, runs: list[str]) -> None:
    """Print a line for each run."""
    from llada_megatron.config import compose
    from llada_megatron.record.manifest import find

    for run in runs:
        checkpoint = find(run)
        config = compose.elsewhere(checkpoint.manifest.config_of_weights, ["layout.processes=1"])
        [found] = run_ranks(losses, config, checkpoint.path, block_size)
        print(run, {key: [round(each, 4) for each in value] for key, value in found.items()}, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
