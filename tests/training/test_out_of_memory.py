"""A step without memory names its stage, its samples and the layer; one meets a real limit."""

import resource
from pathlib import Path

import pytest
import torch

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.training.runs import LONG, TWO, configure

TOO_MUCH = 1 << 55
"""Bytes, more than an address space holds."""


class AsksInBackward(torch.autograd.Function):
    """The identity, whose backward allocates."""

    @staticmethod
    def forward(context, x):
        return x.view_as(x)

    @staticmethod
    def backward(context, gradient):
        return gradient + torch.empty(TOO_MUCH, dtype=torch.uint8)[0]


def train_greedy(config: Config, where: str) -> None:
    """On rank 1, with an allocation from sample 8 on in the third layer's feed-forward part."""
    from llada_megatron.training import loop

    model, begun = [], []
    build = loop.assemble

    def built(*args):
        trainer = build(*args)
        model.extend(trainer.model)
        return trainer

    loop.assemble = built

    def on_batch(indices, batch):
        if begun or max(indices) < 8 or torch.distributed.get_rank() != 1:
            return
        begun.append(True)
        [mlp] = [module for name, module in model[0].named_modules() if name.endswith("layers.2.mlp")]
        if where == "forward":
            mlp.register_forward_pre_hook(lambda *_: torch.empty(TOO_MUCH, dtype=torch.uint8))
        else:
            mlp.register_forward_hook(
                lambda _, inputs, outputs: (AsksInBackward.apply(outputs[0]), outputs[1])
            )

    loop.run(config, on_batch=on_batch)


@pytest.mark.parametrize("where", ["forward", pytest.param("backward", marks=pytest.mark.slow)])
def test_a_step_without_memory_names_the_layer_and_what_to_change(corpus, tmp_path, where):
    layer = "decoder.layers.2" + (".mlp" if where == "forward" else "")
    config = configure(corpus, tmp_path / "run", LONG, TWO, "training.steps=4", "layout.micro_batch=2")
    with pytest.raises(RunFailed) as failed:
        run_ranks(train_greedy, config, where, processes=2)
    said = str(failed.value)
    place = (
        f"in step 2 of stage bdlm_4 (samples 8 to 11), in the {where} of {layer}, which asked for {TOO_MUCH}"
    )
    assert said.startswith(f"Out of memory on rank 1 {place}"), said
    assert (
        "micro_batch, 2 now; set layout.recompute=selective or full, none now; raise layout.cp, 1 now" in said
    )
    assert not (tmp_path / "run" / "memory").exists(), "a snapshot is of a CUDA device"


def train_limited(config: Config) -> None:
    """With a little more address space than the process has when its second step begins."""
    from llada_megatron.training import loop

    def limit(indices, batch):
        if max(indices) >= 4:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            here = pages * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (here + (1 << 20), resource.RLIM_INFINITY))

    loop.run(config, on_batch=limit)


@pytest.mark.slow
def test_a_real_limit_of_memory_is_met_inside_the_model(corpus, tmp_path):
    long = ["data.sequence_length=2048", "schedule.stages=[{name: s, block_size: '4', tokens: 2560000}]"]
    config = configure(corpus, tmp_path / "run", *long, "training.steps=4", "model.ffn_hidden_size=1024")
    with pytest.raises(
        RunFailed, match=r"Out of memory on rank 0 in step 1 of stage s \(samples 4 to 7\), in the"
    ):
        run_ranks(train_limited, config)
