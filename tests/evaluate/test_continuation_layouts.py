"""Every layout scores continuations as one process does, and every rank has all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from llada_megatron.evaluate.continuation import Pair, Scorer
from llada_megatron.parallel import groups
from tests.distributed import run_ranks
from tests.generate.models import prompt_of, settings, tiny

LENGTHS = ((3, 6), (20, 1), (1, 11), (9, 3), (5, 2))


def scored(overrides: list[str]) -> Any:
    """Of block diffusion and of an autoregressive model: the nats, the error, whether it is greedy."""
    config = settings("layout.global_batch=4", *overrides)
    torch.set_num_threads(1)
    groups.initialize(config.layout)
    pairs = [Pair(n, prompt_of(c, n), prompt_of(m, n)) for n, (c, m) in enumerate(LENGTHS)]
    model = tiny(config)
    found = {}
    for block_size in (0, 4):
        scorer = Scorer(config, model, block_size, draws=4, seed=2, tokens=25)
        results = sorted(scorer.run(pairs), key=lambda each: each.number)
        found[block_size] = [(each.nats, each.se, each.is_greedy) for each in results]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (2, ["layout.tp=2"]),
        (2, ["layout.ep=2"]),
        (2, []),
        pytest.param(4, ["layout.tp=2", "layout.ep=4"], marks=pytest.mark.full),
        pytest.param(2, ["layout.ep=2", "layout.dispatcher=allgather"], marks=pytest.mark.full),
    ],
    ids=lambda value: "-".join(value) or "dp2" if isinstance(value, list) else f"{value}",
)
def test_a_layout_scores_as_one_process_does(processes, overrides):
    (alone,) = run_ranks(scored, [])
    for found in run_ranks(scored, [f"layout.processes={processes}", *overrides], processes=processes):
        for block_size, expected in alone.items():
            for ours, theirs in zip(found[block_size], expected, strict=True):
                np.testing.assert_allclose(ours[:2], theirs[:2], atol=5e-4)
                assert ours[2] == theirs[2]
