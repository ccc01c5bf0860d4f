"""Compiles `cudnn.flex_attention` through our executor for GPUs that are not there: `make gpu-compile`.

Tensors are fake, kernels are not: each is compiled to machine code of the architecture, in a process without
the CPU seam. Fails when our call does not fit the package, or a step leaves no kernel. It says nothing about
numbers or speed, since nothing runs; a few small kernels that plan the work are compiled on a device only.
"""

import argparse
import logging
import os
import site
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

ARCHITECTURES = ("sm_90a", "sm_100a")
MODELS = ("llada2_mini", "llada2_flash")
TOKENS = 4096  # L, so that 2L = 8192


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--packages", type=Path, required=True, help="where the cuDNN frontend is installed")
    parser.add_argument("--architecture", choices=ARCHITECTURES, help="this one only, in this process")
    args = parser.parse_args()
    if args.architecture:
        # The package prints a line per kernel, and warns that its interface is experimental.
        logging.disable(logging.WARNING)
        with tempfile.TemporaryDirectory() as kernels, redirect_stdout(None):
            compile_for(args.architecture, args.packages, Path(kernels))
        return 0
    command = [sys.executable, "-m", "tests.gpu.compile_cudnn", "--packages", str(args.packages)]
    running = {each: subprocess.Popen([*command, "--architecture", each]) for each in ARCHITECTURES}
    failed = [each for each, process in running.items() if process.wait()]
    print(f"failed: {', '.join(failed)}" if failed else "all compiled, and nothing was run", flush=True)
    return 1 if failed else 0


def compile_for(architecture: str, packages: Path, kernels: Path) -> None:
    """Compile every step of every model; raises when one does not."""
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # the package asks fake tensors for their address
        "CUTE_DSL_ARCH": architecture,
        "FLEX_ATTENTION_ARCH": architecture,
        "FLEX_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",  # each compiled kernel becomes a file there
        "FLEX_ATTENTION_CUTE_DSL_CACHE_DIR": str(kernels),
    }
    site.addsitedir(str(packages))  # it holds a .pth file
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from llada_megatron.attention import BlockDiffusionMask
    from llada_megatron.attention.context import ContextShard

    pretend_device(int(architecture.strip("sm_a")))
    check_stated_limits()
    packed = torch.tensor([0, 1000, 1024, TOKENS])
    mask = BlockDiffusionMask([packed, torch.tensor([0, TOKENS])], 32)
    packed_causal, causal = (
        BlockDiffusionMask([documents], 1, clean_copy=False, causal=True)
        for documents in (packed, torch.tensor([0, TOKENS]))
    )
    shard, decoding = ContextShard(mask, rank=1, ranks=4), decoding_rectangles()
    watch = Watch(architecture, kernels)
    with FakeTensorMode():
        for model in MODELS:
            # One, three and five endpoints per row; the last with other rows than keys.
            for rectangle in (causal.whole(), packed_causal.whole(), shard.rectangle):
                attend(model, rectangle)
            output = attend(model, mask.whole())
            watch.compiled(f"{model} forward")
            run_backward(output)
            watch.compiled(f"{model} backward")
            torch.use_deterministic_algorithms(True)
            run_backward(attend(model, mask.whole()))
            watch.compiled(f"{model} deterministic backward")
            torch.use_deterministic_algorithms(False)
            for rectangle in decoding:
                attend(model, rectangle, learns=False)
            watch.compiled(f"{model} decoding", at_least=0)


def decoding_rectangles():
    """Rows of 32 at a time: one active block, those of eight sequences, and one behind a block just done."""
    import numpy as np

    from llada_megatron.attention.keys import KeyPool, PooledKeys

    eight = [(32 * n, 32 * n + 32) for n in range(1, 65, 8)]
    return [
        PooledKeys(KeyPool(1), [(kept, np.arange(length)) for kept, length in parts], 32).rectangle
        for parts in ([(4000, 4032)], eight, [(4000, 4064), *eight[:3]])
    ]


def pretend_device(number: int) -> None:
    """Answer what torch and the package ask about the device before anything is launched."""
    import torch
    from cudnn.flex_attention.runtime.arch import get_device_arch

    torch.cuda.get_device_capability = lambda device=None: divmod(number, 10)
    torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = lambda index: 0
    with mock.patch.object(torch.cuda, "is_available", return_value=True):
        assert get_device_arch(0) == number  # it remembers the answer


def check_stated_limits() -> None:
    """What our executor says it can serve is what the package says."""
    from importlib.metadata import version

    from cudnn.flex_attention.plan import validation
    from cudnn.flex_attention.runtime import arch

    from llada_megatron.attention import cudnn_flex

    installed = tuple(map(int, version(cudnn_flex.PACKAGE).split(".")[:2]))
    assert installed >= cudnn_flex.OLDEST_VERSION
    assert {f"sm_{number}" for number in arch.SUPPORTED_ARCHES} == {*cudnn_flex.ARCHITECTURES}
    assert {*validation.SUPPORTED_DTYPES} == {*cudnn_flex.DTYPES}
    square = {size for size, value_size in validation.SUPPORTED_HEAD_DIMS if size == value_size}
    assert square == {*cudnn_flex.HEAD_DIMS}


def attend(model: str, rectangle, backend: str = "cudnn_flex", *, learns: bool = True):
    """The output of our executor, chosen by the registry, for the head shape of a model."""
    import torch

    from llada_megatron.attention import block_diffusion_attention
    from llada_megatron.config.compose import compose

    shape = compose([f"experiment={model}_cpt"]).model

    def fake(tokens: int, heads: int) -> torch.Tensor:
        size = tokens, rectangle.batch, heads, shape.head_dim
        return torch.empty(size, dtype=torch.bfloat16, device="cuda", requires_grad=learns)

    query, key, value = (
        fake(tokens, heads)
        for tokens, heads in (
            (rectangle.queries, shape.heads),
            (rectangle.keys, shape.kv_heads),
            (rectangle.keys, shape.kv_heads),
        )
    )
    output = block_diffusion_attention(query, key, value, rectangle, backend)
    assert output.shape == query.shape and output.dtype == query.dtype
    return output


def run_backward(output) -> None:
    """Call the nodes of the graph one by one: autograd's engine would want a device.

    The gradient is the one of a plain sum, the least convenient.
    """
    import torch

    node = output.grad_fn
    gradients = (torch.empty((), dtype=output.dtype, device=output.device).expand_as(output),)
    while node.name() != "FlexAttnFuncBackward":
        outcome = node.apply(*gradients) if hasattr(node, "apply") else node(*gradients)
        gradients = outcome if isinstance(outcome, tuple) else (outcome,)
        ((node, _),) = node.next_functions
    gradients = node.apply(*gradients, None, None)[:3]
    assert [gradient.dim() for gradient in gradients] == [4, 4, 4]


class Watch:
    """Counts the kernels of each step, and the seconds."""

    def __init__(self, architecture: str, kernels: Path) -> None:
        self.architecture, self.folder = architecture, kernels
        self.seen: set[Path] = set()
        self.began = time.perf_counter()

    def compiled(self, step: str, at_least: int = 1) -> None:
        new = {*self.folder.rglob("*.o")} - self.seen
        if len(new) < at_least:
            raise RuntimeError(f"{self.architecture} {step}: no kernel was compiled")
        for kernel in new:
            # The object names the assembler's target beside the machine code.
            if self.architecture.encode() not in kernel.read_bytes():
                raise RuntimeError(f"{self.architecture} {step}: {kernel.name} is for another architecture")
        seconds = time.perf_counter() - self.began
        line = f"{self.architecture:<8} {step:<36} kernels {len(new)}  {seconds:5.1f} s"
        print(line, file=sys.__stdout__, flush=True)
        self.seen |= new
        self.began = time.perf_counter()


if __name__ == "__main__":
    sys.exit(main())
