"""Has cuDNN accept the operation graphs of `cudnn_graph` where there is no GPU: part of `make gpu-compile`.

Tensors are fake; the graphs are described by our executor, forward, backward and deterministic backward, and
checked by the frontend's validation and by cuDNN's own operation graph. Choosing and compiling a kernel needs
the properties of a device, which only a device can give: that is left to `make test-gpu`.
"""

import argparse
import os
import site
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

from tests.gpu.compile_cudnn import MODELS, TOKENS, attend, decoding_rectangles


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--packages", type=Path, required=True, help="where the cuDNN frontend is installed")
    site.addsitedir(str(parser.parse_args().packages))
    import cudnn
    import numpy as np
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llada_megatron.attention import BlockDiffusionMask, cudnn_sdpa
    from llada_megatron.attention.context import ContextShard
    from tests.attention.test_executors import grouped

    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    cudnn._pygraph._default_backend_handle = lambda: None
    cudnn.pygraph = partial(cudnn.pygraph, sm_version=90)
    mask = BlockDiffusionMask([torch.tensor([0, 1000, 1024, TOKENS]), torch.tensor([0, TOKENS])], 32)
    causal = BlockDiffusionMask(mask.cu_seqlens, 1, clean_copy=False, causal=True)
    groups = grouped(mask, 0.5, np.random.default_rng(0))
    shard, decoding = ContextShard(mask, rank=1, ranks=4), decoding_rectangles()
    accepted: set[cudnn_sdpa.Graph] = set()

    def accept(graph: cudnn_sdpa.Graph, buffers: dict[str, torch.Tensor]) -> None:
        check_buffers(graph, buffers)
        if graph not in accepted:
            graph.graph.key()  # validates, and has cuDNN finalise the operation graph
            accepted.add(graph)

    began = time.perf_counter()
    with (
        FakeTensorMode(),
        mock.patch.object(cudnn_sdpa.Graph, "run", accept),
        mock.patch.object(cudnn_sdpa, "handle_of", lambda device: None),
    ):
        for model in MODELS:
            for rectangle in (mask.whole(), causal.whole(), shard.rectangle, groups.whole()):
                for deterministic in (False, True):
                    torch.use_deterministic_algorithms(deterministic)
                    output = attend(model, rectangle, "cudnn_graph")
                    of_sum = torch.empty((), dtype=output.dtype, device="cuda").expand_as(output)
                    gradients = output.grad_fn.apply(of_sum)
                    assert [tensor.dtype for tensor in gradients[:3]] == [output.dtype] * 3
            for rectangle in decoding:
                attend(model, rectangle, "cudnn_graph", learns=False)
        check_that_a_wrong_graph_is_refused(max(accepted, key=lambda graph: graph.geometry.queries))
    seconds = time.perf_counter() - began
    print(f"cuDNN {cudnn.backend_version()}: {len(accepted)} operation graphs accepted, {seconds:.1f} s")
    return 0


def check_buffers(graph, buffers) -> None:
    """Every tensor of the graph gets a buffer of its type, and of just its size where it is not ragged."""
    assert buffers.keys() == graph.tensors.keys()
    for name, tensor in graph.tensors.items():
        declared = tensor.get_data_type().name.lower()
        declared = "float32" if declared == "float" else declared
        assert str(buffers[name].dtype) == f"torch.{declared}", name
        if not graph.geometry.ragged or name.endswith(("lengths", "offsets")):
            shapes = (tensor.get_dim(), tensor.get_stride()), (buffers[name].shape, buffers[name].stride())
            assert len({sum((d - 1) * s for d, s in zip(*shape, strict=True)) for shape in shapes}) == 1, name


def check_that_a_wrong_graph_is_refused(graph) -> None:
    """The check has teeth: the same graph with a head that is too long is refused."""
    from dataclasses import replace

    from llada_megatron.attention.cudnn_sdpa import forward_graph

    try:
        forward_graph(replace(graph.geometry, head_dim=100)).graph.key()
    except Exception as refusal:
        assert "100" in str(refusal) or "multiple" in str(refusal), refusal
        return
    raise AssertionError("cuDNN accepts any graph here")


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the package fills the terminal with its own leaks at a regular exit
