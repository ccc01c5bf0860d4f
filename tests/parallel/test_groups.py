"""The groups of a layout, and what joining them sets."""

import os

from tests.distributed import run_ranks


def joined():
    import torch
    from megatron.core import parallel_state

    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups
    from llada_megatron.runtime import device

    before = os.sched_getaffinity(0)
    groups.initialize(LayoutConfig(processes=2), threads=0, timeout_sec=77)
    ours = parallel_state.get_data_parallel_group(), torch.distributed.group.WORLD
    groups.wait_longer(88)
    limits = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in ours]
    gloo = parallel_state._DATA_PARALLEL_GROUP_GLOO
    return limits, device.threads(), os.sched_getaffinity(0) == before, gloo


def test_every_group_waits_as_long_as_is_said_and_no_second_set_of_groups_is_made():
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert run_ranks(joined, processes=2) == [([77.0, 88.0], threads, True, None)] * 2
