"""Decoding on a CUDA device: the tokens of the CPU, bf16, and CUDA graphs. `make test-gpu` runs it."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from llada_megatron.attention import block_diffusion_attention, select_backend
from llada_megatron.attention.keys import KeyPool, PooledKeys
from llada_megatron.config.errors import BadInput
from tests.gpu.test_attention import DEVICE, DTYPE, HEAD_DIM, HEADS, TOLERANCE, draw

pytestmark = pytest.mark.gpu

RUN = Path(__file__).parents[1] / "old_run" / "run"
PROMPTS = [[5, 6, 7], [*range(100, 130)], [9] * 17, [*range(40, 45)]]
PARTS = {  # of each sequence the tokens whose keys are kept, and its length
    "an active block": [(480, 512)],
    "blocks of eight sequences": [(32 * n, 32 * n + 32) for n in (0, 1, 3, 7, 15, 31, 63, 127)],
    "a block that was just done": [(448, 512), (96, 128)],
    "a prompt beside a block": [(0, 500), (1024, 1056)],
    "one token a block": [(100, 101), (7, 8)],
}
EXECUTORS = ["varlen", "cudnn_flex", "flex_torch", "cudnn_graph", "portable"]


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("executor", EXECUTORS)
def test_rows_of_decoding_equal_the_reference(executor, parts, heads, kv_heads):
    try:
        select_backend(executor, torch.device(DEVICE), DTYPE, HEAD_DIM, needs_backward=False)
    except BadInput as refusal:
        pytest.skip(str(refusal))
    torch.compiler.reset()
    places = [(kept, np.arange(length)) for kept, length in PARTS[parts]]
    rectangle = PooledKeys(KeyPool(1), places, 1 if "one token" in parts else 32).rectangle
    *inputs, _ = draw(rectangle, heads, kv_heads)
    got = block_diffusion_attention(*inputs, rectangle, executor).double()
    exact = block_diffusion_attention(*(tensor.double() for tensor in inputs), rectangle, "reference")
    assert float((got - exact).norm() / exact.norm()) < TOLERANCE


def tokens(directory, *settings, cuda=True):
    directory.mkdir(parents=True)
    source, output = directory / "prompts.jsonl", directory / "out.jsonl"
    source.write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in PROMPTS))
    environment = {**os.environ, "NVIDIA_TF32_OVERRIDE": "0"} | ({} if cuda else {"CUDA_VISIBLE_DEVICES": ""})
    files = ["--input", str(source), "--output", str(output)]
    command = [sys.executable, "-m", "llada_megatron", "generate", str(RUN), *files, "--max-new-tokens", "24"]
    command += ["--batch", "3", "--threshold", "0.01", "data.sequence_length=64", *settings]
    subprocess.run(command, env=environment, check=True)
    return [json.loads(line)["tokens"] for line in output.read_text().splitlines()]


def test_tokens_equal_those_of_the_cpu(tmp_path):
    local = "model.layer_spec=local"
    on_cuda = tokens(tmp_path / "cuda", local)
    assert on_cuda == tokens(tmp_path / "cpu", local, cuda=False)


@pytest.mark.parametrize("settings", [[], ["--cuda-graphs"]], ids=["eager", "graphs"])
def test_bf16_decodes(tmp_path, settings):
    if settings:
        skip_without_graphs()
    found = tokens(tmp_path / "bf16", "precision.dtype=bf16", "model.layer_spec=local", *settings)
    assert all(len(each) == 24 for each in found)


def skip_without_graphs():
    from llada_megatron.generate.graphs import GROUPED
    from llada_megatron.runtime import device

    if (found := device.architecture(torch.device(DEVICE))) not in GROUPED:
        pytest.skip(f"{found} has no grouped product without the host")


def eager(function):
    """What a graph does, launched anew each time."""
    output = function()
    return output, lambda: output.copy_(function())


@pytest.fixture
def world():
    from llada_megatron.config.schema import LayoutConfig
    from llada_megatron.parallel import groups

    groups.initialize(LayoutConfig())
    yield
    groups.destroy()


@pytest.mark.parametrize("batch", [1, 3])
def test_graphs_change_no_token(world, batch):
    from llada_megatron.generate import Decoder, Limits
    from llada_megatron.generate.graphs import Graphs
    from llada_megatron.generate.rules import rule_of
    from tests.generate.models import CONTEXT, MASK, settings, tiny

    skip_without_graphs()
    model = tiny(settings("precision.dtype=bf16", "model.layer_spec=local")).requires_grad_(False)
    rule = rule_of("threshold", {"threshold": 0.05})
    made = partial(Decoder, model, rule, block_size=4, mask_token_id=MASK, context=CONTEXT, batch=batch)
    ours, other = made(cuda_graphs=True), made(cuda_graphs=True)
    other.graphs = Graphs(model, capture=eager)  # the same kernels
    limits = Limits(new_tokens=48)
    for result, expected in zip(ours.results(PROMPTS, limits), other.results(PROMPTS, limits), strict=True):
        assert result.tokens.tolist() == expected.tokens.tolist()
    assert ours.graphs.replayed > ours.graphs.captured > 0
