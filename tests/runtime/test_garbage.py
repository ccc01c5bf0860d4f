"""Garbage that is collected by hand, at the same step on every rank."""

import gc

import pytest

from llada_megatron.runtime import garbage
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks
from tests.training.runs import configure


class Cycle:
    alive = 0

    def __init__(self):
        self.self = self
        Cycle.alive += 1

    def __del__(self):
        Cycle.alive -= 1


def test_what_is_unreachable_goes_at_every_nth_step_and_not_before():
    with garbage.by_hand(2):
        Cycle()
        [[] for _ in range(10_000)]
        garbage.collect(1, 2)
        assert Cycle.alive == 1 and not gc.isenabled()
        garbage.collect(2, 2)
        assert Cycle.alive == 0
    assert gc.isenabled() and gc.get_freeze_count() == 0
    with garbage.by_hand(0):
        assert gc.isenabled()


def test_python_has_its_way_back_after_an_error():
    with pytest.raises(RuntimeError), garbage.by_hand(3):
        raise RuntimeError
    assert gc.isenabled()


def tensors_in_garbage(config):
    import torch

    from llada_megatron.training import loop

    found = []

    def collect(step, every_steps):
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        found.append(sum(each.numel() for each in gc.garbage if isinstance(each, torch.Tensor)))
        gc.garbage.clear()

    loop.garbage.collect = collect
    loop.run(config)
    return found


def test_a_step_leaves_no_tensors_to_the_collector(tmp_path):
    config = configure(write_corpus(tmp_path), tmp_path / "run", "training.steps=4")
    assert run_ranks(tensors_in_garbage, config) == [[0, 0, 0, 0]]
