"""Adapters and frozen parameters: what is trained, the same in every layout, and what a checkpoint holds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llada_megatron.checkpoint.shards import ShardsReader, whole
from llada_megatron.config import rules
from llada_megatron.config.errors import BadInput
from llada_megatron.config.parameters import total_parameters
from llada_megatron.config.schema import Config
from llada_megatron.record.run_dir import SHARDS
from tests.distributed import run_ranks
from tests.training.runs import STEPS, checkpoint, configure, records, train

LORA = ["model.lora.rank=4", "model.lora.alpha=8"]
LAYOUTS = {
    "tp2": ["layout.tp=2"],
    "pp2": ["layout.pp=2"],
    "tp2_etp2": ["layout.tp=2", "layout.etp=2"],
    "ep2": ["layout.processes=2", "layout.ep=2"],
    "cp2": ["layout.cp=2"],
    "overlap": ["layout.processes=2", "layout.overlap_grad_reduce=true", "layout.overlap_param_gather=true"],
    "recompute": ["layout.processes=2", "layout.recompute=full"],
}
FAST = ("pp2", "tp2_etp2")


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every weight of a run's last checkpoint, by its name."""
    reader = ShardsReader(checkpoint(run_dir, STEPS) / SHARDS)
    return {name: reader.read(whole(name, *shape)) for name, shape in reader.shapes().items()}


@pytest.fixture(scope="module")
def base(corpus, tmp_path_factory) -> Path:
    """A run of one process without adapters."""
    run_dir = tmp_path_factory.mktemp("base")
    train(configure(corpus, run_dir))
    return run_dir


@pytest.fixture(scope="module")
def adapted(corpus, base, tmp_path_factory) -> Path:
    """A run of one process that trains adapters beside the base's weights."""
    run_dir = tmp_path_factory.mktemp("adapted")
    train(configure(corpus, run_dir, *LORA, f"checkpoint.init_from={base}"))
    return run_dir


def test_adapters_alone_are_trained(base, adapted):
    before, after = weights(base), weights(adapted)
    adapters = {name for name in after if name.endswith((".lora_a", ".lora_b"))}
    assert after.keys() - adapters == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    targets = {name.split(".", 3)[3].rpartition(".")[0] for name in adapters}
    layers = ("linear_fc1", "linear_fc2")
    assert targets == {
        *("self_attention.linear_qkv", "self_attention.linear_proj"),
        *(f"mlp{part}.{layer}" for part in ("", ".shared_experts", ".experts.experts") for layer in layers),
    }
    assert all(after[name].any() for name in adapters)
    model = configure("", adapted, *LORA).model
    assert sum(tensor.numel() for tensor in after.values()) == total_parameters(model)


def test_an_adapter_that_is_new_changes_nothing(corpus, base, adapted):
    """Of the first step alone: B is zero."""
    config = configure(corpus, base / "again", f"checkpoint.init_from={base}")
    assert records(adapted)[0]["loss"] == first_loss(config)


def first_loss(config: Config) -> float:
    [loss] = run_ranks(one_step, config)
    return loss


def one_step(config: Config) -> float:
    from llada_megatron.training import loop

    loop.run(replace(config, training=replace(config.training, steps=1)))
    return records(Path(config.run.dir))[0]["loss"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in LAYOUTS]
)
def test_every_layout_trains_the_same_adapters(corpus, base, adapted, tmp_path, name):
    train(configure(corpus, tmp_path, *LORA, f"checkpoint.init_from={base}", *LAYOUTS[name]))
    for ours, expected in zip(records(tmp_path), records(adapted), strict=True):
        assert ours["loss"] == pytest.approx(expected["loss"], rel=2e-6)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)
    found, wanted = weights(tmp_path), weights(adapted)
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-4, msg=key)


def test_frozen_parameters_and_the_bias_of_a_frozen_router_stay(corpus, base, tmp_path):
    frozen = "training.freeze=['*.router.*','embedding.*','decoder.layers.[01].*']"
    config = configure(corpus, tmp_path, frozen, f"checkpoint.init_from={base}", "layout.pp=2")
    train(config)  # the first pipeline stage holds two of the three layers: it trains nothing
    before, after = weights(base), weights(tmp_path)
    still = ("embedding.", "decoder.layers.0.", "decoder.layers.1.")
    for name in before:
        stays = name.startswith(still) or ".router." in name
        assert torch.equal(before[name], after[name]) == stays, name


def test_recomputing_under_a_frozen_embedding_loses_no_gradient(corpus, base, tmp_path):
    start = ["training.freeze=['embedding.*']", f"checkpoint.init_from={base}", "training.steps=2"]
    train(configure(corpus, tmp_path / "kept", *start))
    train(configure(corpus, tmp_path / "again", *start, "layout.recompute=full"))
    norms = [[step["grad_norm"] for step in records(tmp_path / name)] for name in ("kept", "again")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize(
    ("patterns", "sentence"),
    [("['*.routr.*']", r"no parameter is called \*\.routr\.\*"), ("['*']", "leaves nothing to train")],
)
def test_patterns_that_cannot_be_meant_are_refused(corpus, tmp_path, patterns, sentence):
    with pytest.raises(BadInput, match=sentence):
        train(configure(corpus, tmp_path, f"training.freeze={patterns}"))


def test_a_resume_goes_on_bit_for_bit_and_with_the_same_adapters(corpus, base, adapted, tmp_path):
    start = [*LORA, f"checkpoint.init_from={base}"]
    train(
        configure(corpus, tmp_path, *start, "training.steps=3"),
        configure(corpus, tmp_path, *start),
    )
    found, wanted = weights(tmp_path), weights(adapted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_adapters_are_not_dropped_without_a_word(corpus, base, adapted, tmp_path):
    with pytest.raises(BadInput, match="holds adapters of rank 4"):
        train(configure(corpus, tmp_path, f"checkpoint.init_from={adapted}"))
    with pytest.raises(BadInput, match=r"model\.lora\.rank"):
        train(configure(corpus, adapted, *LORA, "model.lora.rank=8"))


def test_an_experts_adapter_is_cut_along_its_rank():
    overrides = ["model.lora.rank=3", "layout.tp=2", "layout.etp=2"]
    with pytest.raises(BadInput, match=r"layout\.etp=2 does not divide model\.lora\.rank=3"):
        rules.check(configure("runs/none", Path("runs/none"), *overrides))
