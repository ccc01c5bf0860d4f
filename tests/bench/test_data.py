"""What the benchmark of data measures: that its readers agree and its shards are read."""

import numpy as np

from llada_megatron.bench import building, data


def test_the_start_of_a_few_small_shards_is_measured(tmp_path):
    found = data.start(tmp_path, shards=3, shard_bytes=4_000_000, documents=50)
    assert len(found) == 6 and all(seconds > 0 for seconds in found.values())


def test_both_readers_read_the_same_documents(tmp_path):
    assert len(data.reading(tmp_path, tokens=2**22)) == 8


def test_what_building_costs_is_measured():
    found = building.building(64, rounds=1, builds=1)
    assert len(found) == 3 and all(np.isfinite(ms) for ms in found.values())
    assert found["L=64: the builder's CPU, ms"] > 0
