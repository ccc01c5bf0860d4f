"""A dense checkpoint becomes a MoE that computes the same, and every expert of it gets tokens to learn."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llada_megatron.checkpoint import store
from llada_megatron.checkpoint.shards import ShardsReader, whole
from llada_megatron.cli import main
from llada_megatron.config.compose import model_of
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.convert import upcycle as upcycling
from llada_megatron.convert.loaded import causal_logits, load_model
from llada_megatron.data.tokenizer import ByteTokenizer
from llada_megatron.parallel import groups
from llada_megatron.record.manifest import Checkpoint
from tests.convert import checkpoints
from tests.convert.test_round_trip import to_mcore

TEXT = torch.nn.Module.register_forward_hook.__doc__ or ""
EXPERTS = 4


def upcycle(source: Path, target: Path, *options: str) -> int:
    counts = ["--experts", str(EXPERTS), "--experts-per-token", "2"]
    return main(["convert", "upcycle", "--from", str(source), "--to", str(target), *counts, *options])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`dense`, and `moe` whose first layer stays dense."""
    folder = tmp_path_factory.mktemp("upcycle")
    source = checkpoints.add_tokenizer(checkpoints.write(folder / "source", "llama"), {3: "<eos>"})
    assert to_mcore(source, folder / "dense") == 0
    assert upcycle(folder / "dense", folder / "moe", "--dense-layers", "1") == 0
    return folder


def autoregressive_nll(checkpoint: Path) -> tuple[float, list[torch.Tensor]]:
    """The NLL of TEXT's bytes in nats per token, and the tokens of each expert by layer."""
    tokens = torch.tensor(ByteTokenizer().encode(TEXT)[:256])
    groups.initialize(LayoutConfig())
    try:
        model = model_of(checkpoint, Checkpoint.read(checkpoint).manifest.config_of_weights)
        stage = load_model(checkpoint, model, sequence_length=len(tokens))
        logits = causal_logits(stage, tokens)
        counts = [m.local_tokens_per_expert for m in stage.modules() if hasattr(m, "local_tokens_per_expert")]
    finally:
        groups.destroy()
    return float(F.cross_entropy(logits[:-1].double(), tokens[1:])), counts


def test_upcycling_leaves_the_nll_and_gives_every_expert_tokens(folder: Path) -> None:
    (dense, none), (moe, counts) = (autoregressive_nll(folder / name) for name in ("dense", "moe"))
    assert moe == pytest.approx(dense, rel=1e-5) and not none
    assert len(counts) == checkpoints.LAYERS - 1
    for tokens in counts:
        assert tokens.sum() == 2 * 256 and (tokens >= 256 / 10).all()


def test_experts_are_copies_and_the_routers_differ_by_layer_and_seed(folder: Path, tmp_path: Path) -> None:
    assert upcycle(folder / "dense", tmp_path / "other", "--dense-layers", "1", "--seed", "2") == 0
    dense, moe, other = (
        ShardsReader(path / "shards") for path in (folder / "dense", folder / "moe", tmp_path / "other")
    )

    def tensor(shards: ShardsReader, name: str) -> torch.Tensor:
        return shards.read(whole(name, *shards.shapes()[name]))

    for layer in (1, 2):
        for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
            name = f"decoder.layers.{layer}.mlp."
            for expert in tensor(moe, f"{name}experts.experts.{matrix}"):
                assert torch.equal(expert, tensor(dense, f"{name}{matrix}"))
        assert not tensor(moe, f"decoder.layers.{layer}.mlp.router.expert_bias").any()
    first, second = (f"decoder.layers.{layer}.mlp.router.weight" for layer in (1, 2))
    assert not torch.equal(tensor(moe, first), tensor(moe, second))
    assert not torch.equal(tensor(moe, first), tensor(other, first))
    std = tensor(moe, first).float().std()
    assert std == pytest.approx(0.02, rel=0.2)  # config.json names none, so it is the published default


def test_the_manifest_names_the_source_and_the_tokenizer_travels(folder: Path) -> None:
    manifest = store.verified(Checkpoint.read(folder / "moe")).manifest
    assert manifest.lineage["kind"] == "upcycle"
    assert manifest.lineage["source"] == str((folder / "dense").resolve())
    certificate = json.loads((folder / "moe" / "certificate.json").read_text())
    assert certificate["passed"] and certificate["logits"]["max_difference"] < 1e-5
    assert certificate["parameters"]["written"] == certificate["parameters"]["architecture"]
    assert (folder / "moe" / "hf" / "tokenizer.json").is_file()


def test_an_expert_that_is_no_copy_fails_the_certificate(folder: Path, tmp_path: Path, monkeypatch) -> None:
    real = upcycling._parts

    def damaged(*args):
        for part, values in real(*args):
            other = part.name.endswith("experts.linear_fc2.weight") and part.offset[0] == 2
            yield part, 2 * values if other else values

    monkeypatch.setattr(upcycling, "_parts", damaged)
    assert upcycle(folder / "dense", tmp_path / "moe") == 1
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("moe", [], "has 4 experts already"),
        ("dense", ["--experts-per-token", "1"], "must lie between 2 and --experts 4"),
        ("dense", ["--experts-per-token", "5"], "must lie between 2 and --experts 4"),
        ("dense", ["--dense-layers", "3"], "leaves none of 3 layers"),
    ],
)
def test_what_makes_no_moe_is_refused(
    folder: Path, tmp_path: Path, capsys, source: str, options: list[str], sentence: str
) -> None:
    assert upcycle(folder / source, tmp_path / "result", *options) == 2
    assert sentence in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
