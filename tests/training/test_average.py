"""The moving average of the weights: what it is, over resumes in any layout, and as a checkpoint."""

import shutil

import pytest
import torch

from llada_megatron.commands import checkpoint as verb
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.record.manifest import Checkpoint
from tests.distributed import run_ranks
from tests.training.runs import LONG, TWO, checkpoint, configure

DECAY = 0.75
AVERAGED = [LONG, f"training.ema_decay={DECAY}", "optimizer.lr=1e-2", "checkpoint.every_steps=1"]
AVERAGED += ["checkpoint.keep_last=10"]


def train(*configs: Config) -> None:
    from llada_megatron.training import loop

    for config in configs:
        loop.run(config)


def tensors(folder, part: str) -> dict[str, torch.Tensor]:
    from llada_megatron.checkpoint.shards import ShardsReader, whole

    reader = ShardsReader(folder / part)
    return {name: reader.read(whole(name, *shape)) for name, shape in reader.shapes().items()}


def test_it_is_the_recurrence_over_the_weights_and_resumes_in_any_layout(corpus, tmp_path):
    def configured(name: str, *overrides: str) -> Config:
        return configure(corpus, tmp_path / name, *AVERAGED, *overrides)

    begun = configured("resumed", TWO, "training.steps=2")
    run_ranks(train, configured("straight", TWO, "training.steps=4"), begun, processes=2)
    shutil.copytree(tmp_path / "resumed", tmp_path / "elsewhere")
    tp2 = ["layout.processes=2", "layout.tp=2", "run.allow_change=[optimizer.lr]"]
    elsewhere = configured("elsewhere", *tp2, "training.steps=3", "optimizer.lr=0")
    run_ranks(train, configured("resumed", TWO, "training.steps=4"), elsewhere, processes=2)

    steps = [checkpoint(tmp_path / "straight", step) for step in range(1, 5)]
    weights, averages = [tensors(step, "shards") for step in steps], [tensors(step, "ema") for step in steps]
    trained = averages[0].keys()
    assert "decoder.final_layernorm.weight" in trained
    assert {name.rpartition(".")[2] for name in weights[0].keys() - trained} == {"expert_bias"}
    for before, now, weight in zip(averages, averages[1:], weights[1:], strict=False):
        for name in trained:
            torch.testing.assert_close(now[name], DECAY * before[name] + (1 - DECAY) * weight[name])
    assert any(not now.equal(weights[-1][name]) for name, now in averages[-1].items())
    resumed = tensors(checkpoint(tmp_path / "resumed", 4), "ema")
    assert all(value.equal(averages[-1][name]) for name, value in resumed.items())
    moved = tensors(checkpoint(tmp_path / "elsewhere", 3), "ema")
    for name, value in moved.items():  # whose weights stand still
        expected = torch.lerp(averages[1][name], weights[1][name], 1 - DECAY)
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)

    assert verb.run(_arguments("average", str(steps[-1]), "--to", str(tmp_path / "averaged"))) == 0
    made = tensors(tmp_path / "averaged", "shards")
    assert made.keys() == weights[-1].keys()
    assert all(value.equal(averages[-1].get(name, weights[-1][name])) for name, value in made.items())
    lineage = Checkpoint.read(tmp_path / "averaged").manifest.lineage
    assert lineage == {"kind": "average", "sources": [{"path": str(steps[-1]), "step": 4}]}


@pytest.mark.slow
def test_a_run_that_begins_to_average_begins_with_its_weights(corpus, tmp_path):
    plain = configure(corpus, tmp_path / "run", LONG, "training.steps=1")
    run_ranks(train, plain)
    with pytest.raises(BadInput, match=r"holds no averaged weights: train with training.ema_decay"):
        verb.run(_arguments("average", str(tmp_path / "run")))
    averaged = configure(corpus, tmp_path / "run", *AVERAGED, "training.steps=2", "optimizer.lr=0")
    averaged.run.allow_change = ["optimizer.lr"]
    run_ranks(train, averaged)
    weights = tensors(checkpoint(tmp_path / "run", 1), "shards")
    for name, value in tensors(checkpoint(tmp_path / "run", 2), "ema").items():
        assert value.equal(weights[name])


def _arguments(*words: str):
    import argparse

    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return parser.parse_args(words)
