"""Which executor is taken where, and what a refusal says. Devices and packages are pretended."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from llada_megatron.attention import BlockDiffusionMask, block_diffusion_attention, registry, select_backend
from llada_megatron.attention import cudnn_flex as cudnn_flex_module
from llada_megatron.attention.cudnn_flex import cudnn_flex_attention
from llada_megatron.attention.cudnn_graph import cudnn_graph_attention
from llada_megatron.attention.flex_torch import flex_torch_attention
from llada_megatron.attention.portable import portable_attention
from llada_megatron.attention.varlen import varlen_attention
from llada_megatron.config.errors import BadInput
from llada_megatron.runtime import device

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def pretend(monkeypatch):
    def machine(architecture="sm_90", frontend="1.32.0", cudnn=92400):
        monkeypatch.setattr(device, "architecture", lambda where: architecture)
        monkeypatch.setattr(cudnn_flex_module, "installed_version", lambda: frontend)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
        select_backend.cache_clear()

    yield machine
    select_backend.cache_clear()


def test_auto_on_a_cpu_is_portable_and_says_why_not_the_faster_ones():
    executor, reason = select_backend("auto", CPU, torch.float32, 64)
    assert executor is portable_attention
    assert reason == (
        "portable: the fastest that can serve here"
        "; cudnn_flex needs an sm_90, sm_100 or sm_103 device, this is a CPU"
        "; flex_torch has no backward on a CPU, where it serves inference only"
        "; cudnn_graph needs an sm_90 or sm_100 device, this is a CPU"
    )


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "sm_103"])
def test_auto_on_hopper_and_blackwell_is_cudnn_flex(pretend, architecture):
    pretend(architecture)
    executor, reason = select_backend("auto", CUDA, torch.bfloat16, 128)
    assert executor is cudnn_flex_attention
    assert reason == "cudnn_flex: the fastest that can serve here"


@pytest.mark.parametrize(
    "machine, dtype, head_dim, executor, reason",
    [
        (("sm_80",), torch.bfloat16, 128, flex_torch_attention, "sm_103 device, this is an sm_80"),
        (("sm_120",), torch.bfloat16, 128, flex_torch_attention, "sm_103 device, this is an sm_120"),
        (("sm_90", None), torch.bfloat16, 128, flex_torch_attention, "nvidia-cudnn-frontend, which is not"),
        (("sm_90", "1.29.1"), torch.bfloat16, 128, flex_torch_attention, "1.32 or later, 1.29.1 is"),
        (("sm_90",), torch.float32, 128, flex_torch_attention, "bfloat16 and float16, not float32"),
        (("sm_90",), torch.bfloat16, 192, flex_torch_attention, "multiple of 8 up to 128, not 192"),
        (("sm_90",), torch.float64, 128, portable_attention, "flex_torch serves .*, not float64"),
        (("sm_90",), torch.bfloat16, 12, portable_attention, "flex_torch serves .* 16 or more, not 12"),
    ],
)
def test_auto_names_the_requirement_that_a_faster_executor_misses(
    pretend, machine, dtype, head_dim, executor, reason
):
    pretend(*machine)
    chosen, line = select_backend("auto", CUDA, dtype, head_dim)
    assert chosen is executor and "\n" not in line
    assert re.search(reason, line)


def test_a_configured_executor_that_cannot_serve_is_refused_with_what_is_missing(pretend):
    with pytest.raises(BadInput, match=r"model\.attention_backend=cudnn_flex needs .*this is a CPU"):
        select_backend("cudnn_flex", CPU, torch.bfloat16, 128)
    pretend()
    with pytest.raises(BadInput, match=r"attention_backend=cudnn_flex serves a head_dim .*not 100"):
        select_backend("cudnn_flex", CUDA, torch.bfloat16, 100)
    assert select_backend("cudnn_flex", CUDA, torch.bfloat16, 128)[0] is cudnn_flex_attention


@pytest.mark.parametrize(
    "machine, dtype, head_dim, reason",
    [
        (("sm_80",), torch.bfloat16, 128, "needs an sm_90 or sm_100 device, this is an sm_80"),
        (("sm_90", None), torch.bfloat16, 128, "needs the package nvidia-cudnn-frontend, which is not"),
        (("sm_90", "1.14.0"), torch.bfloat16, 128, "needs nvidia-cudnn-frontend 1.20 or later, 1.14.0 is"),
        (("sm_90", "1.28.0", 91002), torch.bfloat16, 128, "needs cuDNN 9.24 or later, torch has 9.10"),
        (("sm_90", "1.28.0", None), torch.bfloat16, 128, "needs cuDNN 9.24 or later, torch has none"),
        (("sm_90",), torch.float32, 128, "serves bfloat16 and float16, not float32"),
        (("sm_90",), torch.bfloat16, 192, "serves a head_dim of 64, 96, 128 or 256, not 192"),
    ],
)
def test_cudnn_graph_names_the_requirement_that_it_misses(pretend, machine, dtype, head_dim, reason):
    pretend(*machine)
    with pytest.raises(BadInput, match=f"model.attention_backend=cudnn_graph {reason}"):
        select_backend("cudnn_graph", CUDA, dtype, head_dim)


def test_cudnn_graph_serves_where_the_frontend_has_no_flex_attention(pretend):
    pretend("sm_90", "1.28.0")
    with pytest.raises(BadInput, match=r"needs nvidia-cudnn-frontend 1\.32 or later"):
        select_backend("cudnn_flex", CUDA, torch.bfloat16, 128)
    assert select_backend("cudnn_graph", CUDA, torch.bfloat16, 128)[0] is cudnn_graph_attention


@pytest.mark.parametrize("architecture, serves", [("sm_90", True), ("sm_100", False)])
def test_a_deterministic_backward_of_cudnn_graph_exists_on_hopper_alone(pretend, architecture, serves):
    pretend(architecture)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if serves:
            select_backend("cudnn_graph", CUDA, torch.bfloat16, 128)
        else:
            with pytest.raises(BadInput, match=r"sm_100: set precision.deterministic=false"):
                select_backend("cudnn_graph", CUDA, torch.bfloat16, 128)
        select_backend("cudnn_graph", CUDA, torch.bfloat16, 128, needs_backward=False)
    finally:
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_auto_on_a_gpu_is_varlen_for_the_few_rows_of_decoding_alone(pretend, architecture):
    pretend(architecture)
    tensors = CUDA, torch.bfloat16, 128
    executor, reason = select_backend("auto", *tensors, needs_backward=False, few_rows=True)
    assert executor is varlen_attention and reason == "varlen: the fastest that can serve here"
    for needs_backward, few_rows in ((True, True), (False, False), (True, False)):
        executor, _ = select_backend("auto", *tensors, needs_backward=needs_backward, few_rows=few_rows)
        assert executor is not varlen_attention


@pytest.mark.parametrize(
    "machine, device, dtype, head_dim, reason",
    [
        (("CPU",), CPU, torch.bfloat16, 128, "needs a device of sm_80 or later, this is a CPU"),
        (("sm_75",), CUDA, torch.bfloat16, 128, "needs a device of sm_80 or later, this is an sm_75"),
        (("sm_90",), CUDA, torch.float32, 128, "serves bfloat16 and float16, not float32"),
        (("sm_90",), CUDA, torch.bfloat16, 100, "serves a head_dim .* of 8 up to 256, not 100"),
        (("sm_90",), CUDA, torch.bfloat16, 264, "serves a head_dim .* of 8 up to 256, not 264"),
    ],
)
def test_few_rows_that_varlen_cannot_serve_are_portable(pretend, machine, device, dtype, head_dim, reason):
    pretend(*machine)
    tensors = device, dtype, head_dim, False
    executor, line = select_backend("auto", *tensors, few_rows=True)
    assert executor is portable_attention
    assert re.fullmatch(f"portable: the fastest that can serve here; varlen {reason}", line)
    with pytest.raises(BadInput, match=f"model.attention_backend=varlen {reason}"):
        select_backend("varlen", *tensors)


def test_varlen_is_refused_for_training(pretend):
    pretend()
    with pytest.raises(BadInput, match="attention_backend=varlen serves decoding alone, without a backward"):
        select_backend("varlen", CUDA, torch.bfloat16, 128)


def test_few_rows_ask_for_the_executor_of_few_rows(pretend, monkeypatch):
    pretend()
    asked = []
    monkeypatch.setattr(
        registry, "select_backend", lambda *given: asked.append(given) or (lambda q, *rest: q, "")
    )
    mask = BlockDiffusionMask([torch.tensor([0, 12])], 4, clean_copy=False, causal=True)
    rows = mask.whole()
    for rectangle in (rows, replace(rows, few_rows=True)):
        block_diffusion_attention(*[torch.zeros(12, 1, 2, 8)] * 3, rectangle)
    assert [given[-1] for given in asked] == [False, True]


def test_a_call_that_the_executor_cannot_serve_is_refused_by_value():
    mask = BlockDiffusionMask([torch.tensor([0, 12])], 4)
    qkv = [torch.zeros(24, 1, 2, 8)] * 3
    with pytest.raises(BadInput, match=r"cudnn_flex needs an sm_90, sm_100 or sm_103 device, this is a CPU"):
        block_diffusion_attention(*qkv, mask, "cudnn_flex")


def test_an_unknown_backend_is_refused_with_the_choices():
    with pytest.raises(BadInput, match=r"model\.attention_backend.*auto, reference, portable.*'flash'"):
        select_backend("flash", CPU, torch.float32, 64)


def test_asking_for_an_executor_imports_neither_cudnn_nor_torch_compile():
    code = (
        "import sys, torch; from llada_megatron.attention import select_backend;"
        "select_backend('auto', torch.device('cpu'), torch.float32, 64);"
        "sys.exit(any(name in sys.modules for name in ('cudnn', 'cutlass', 'torch._inductor.compile_fx')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
