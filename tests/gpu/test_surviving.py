"""What a run on a CUDA device leaves behind when it is profiled and when its memory ends."""

import gzip
import json
import pickle

import pytest

pytestmark = pytest.mark.gpu


def test_a_trace_holds_kernels_and_the_ranges_of_a_step(tmp_path):
    import torch

    from llada_megatron.runtime.profiler import Profiler, marked

    x = torch.ones(512, 512, device="cuda")
    profiler = Profiler(ranges_alone=False)
    profiler.start()
    with marked("passes"):
        x @ x
    profiler.stop()
    profiler.write_trace(tmp_path / "trace.json.gz")
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert {"passes"} <= {event.get("name") for event in events}
    assert any(event.get("cat") == "kernel" for event in events)
    assert profiler.operators()[0]["ms"] > 0
    ranges = Profiler(ranges_alone=True)
    ranges.start()
    with marked("passes"):
        x @ x
    ranges.stop()
    assert ranges.operators() == []


def test_a_snapshot_of_memory_knows_who_asked(tmp_path):
    import torch

    from llada_megatron.runtime import device

    device.record_memory()
    kept = torch.empty(1 << 20, device="cuda")
    with pytest.raises(torch.OutOfMemoryError) as failed:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
    assert device.is_out_of_memory(failed.value)
    assert device.write_memory_snapshot(tmp_path / "memory" / "rank_00000.pickle")
    snapshot = pickle.loads((tmp_path / "memory" / "rank_00000.pickle").read_bytes())
    frames = [
        frame["filename"]
        for segment in snapshot["segments"]
        for block in segment["blocks"]
        for frame in block.get("frames", [])
    ]
    assert any(name.endswith("test_surviving.py") for name in frames)
    assert device.reserved_memory_bytes() >= kept.numel() * 4
    torch.cuda.memory._record_memory_history(enabled=None)
