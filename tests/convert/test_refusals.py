"""Bad input gets one sentence and exit code 2, or a failed certificate and 1; nothing is written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.convert import checkpoints
from tests.convert.test_round_trip import to_hf, to_mcore


def edited(folder: Path, **settings: object) -> None:
    described = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(described))


def shorten(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def pickled_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def other_numbers(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors")


def mixed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    save_file(weights | {name: weights[name].half()}, folder / "model.safetensors")


def without(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def with_unknown(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.7.x": torch.zeros(2)}, folder / "model.safetensors")


BAD = [
    (lambda f: (f / "config.json").unlink(), 2, "config.json does not exist"),
    (lambda f: (f / "config.json").write_text("{"), 2, "config.json is not JSON"),
    (lambda f: edited(f, rms_norm_eps="small"), 2, "sets rms_norm_eps='small': it must be a number"),
    (lambda f: (f / "model.safetensors").unlink(), 2, "holds no model.safetensors"),
    (pickled_only, 2, "pickled weights (pytorch_model.bin), which can run any code and are not read"),
    (missing_shard, 2, "holds no model-00002-of-00002.safetensors"),
    (lambda f: shorten(f / "model.safetensors", 10), 2, "it is truncated or damaged"),
    (lambda f: (f / "model.safetensors").write_bytes(b"\x80\x05pickle"), 2, "is no safetensors file"),
    (other_numbers, 2, "is of type F8_E4M3 without model.norm.weight_scale_inv"),
    (
        mixed,
        2,
        "gate_proj.weight in BF16 and model.layers.1.mlp.experts.0.up_proj.weight in F16, which become",
    ),
    (lambda f: edited(f, architectures=["GPT2LMHeadModel"]), 2, "GPT2LMHeadModel, which is not served"),
    (lambda f: edited(f, use_qkv_bias=True), 2, "sets use_qkv_bias=True: only False is served"),
    (lambda f: edited(f, num_experts_per_tok=2), 2, "only 4 experts per token, two per group, are served"),
    (lambda f: without(f, "model.norm.weight"), 1, "lacks model.norm.weight"),
    (with_unknown, 1, "also holds model.layers.7.x"),
    (lambda f: edited(f, intermediate_size=64), 1, "is [96, 64] in"),
    (lambda f: edited(f, num_hidden_layers=2), 1, "also holds model.layers.2"),
]


@pytest.mark.parametrize("damage, code, sentence", BAD, ids=[sentence[:25] for _, _, sentence in BAD])
def test_a_checkpoint_that_cannot_be_converted(
    damage: Callable[[Path], object], code: int, sentence: str, tmp_path: Path, capsys
) -> None:
    source = checkpoints.write(tmp_path / "source", "llada2")
    damage(source)
    assert to_mcore(source, tmp_path / "ours") == code
    out, err = capsys.readouterr()
    assert sentence in (err if code == 2 else out)
    assert code == 1 or err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_paths_that_are_not_what_they_should_be(tmp_path: Path, capsys) -> None:
    source = checkpoints.write(tmp_path / "source", "llama")
    assert to_mcore(tmp_path / "nowhere", tmp_path / "ours") == 2
    assert "is no directory" in capsys.readouterr().err
    assert to_hf(source, tmp_path / "back") == 2
    assert "is neither a checkpoint nor a run with one" in capsys.readouterr().err
    for convert, start in ((to_mcore, source), (to_mcore, source), (to_hf, tmp_path / "ours")):
        convert(start, tmp_path / "ours")
    assert capsys.readouterr().err.count("exists already") == 2


def test_damage_to_our_checkpoint_is_named(tmp_path: Path, capsys) -> None:
    assert to_mcore(checkpoints.write(tmp_path / "source", "llama"), tmp_path / "ours") == 0
    shorten(tmp_path / "ours" / "shards" / "__0_0.distcp", 7)
    assert to_hf(tmp_path / "ours", tmp_path / "back") == 2
    assert "shards/__0_0.distcp has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "kind, architecture, sentence",
    [
        ("llama", "LLaDA2MoeModelLM", "The model has no experts"),
        ("llada2", "LlamaForCausalLM", "The model has 8 experts"),
        ("llada2", "Nonesuch", "Nonesuch, which is not served"),
    ],
)
def test_an_architecture_that_cannot_hold_the_model(kind, architecture, sentence, tmp_path, capsys) -> None:
    assert to_mcore(checkpoints.write(tmp_path / "source", kind), tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--architecture", architecture) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    "special, options, outcome",
    [
        ({257: "<|role_end|>"}, [], "--mask-token-id 257 is <|role_end|> in the tokenizer"),
        ({257: "<|role_end|>"}, ["--mask-token", "<|role_end|>"], None),
        ({257: "<|role_end|>"}, ["--mask-token", "<|mask|>"], "in the tokenizer, id 257 is <|role_end|>"),
        ({110: "<|mask|>"}, [], "is free, but the tokenizer's mask is <|mask|>, 110"),
        ({257: "<|mask|>"}, [], None),
        ({}, [], None),
        ({}, ["--mask-token-id", "288"], "is outside the vocabulary of 288"),
    ],
)
def test_the_mask_token_is_the_one_that_was_meant(special, options, outcome, tmp_path, capsys) -> None:
    source = checkpoints.add_tokenizer(checkpoints.write(tmp_path / "source", "llama"), special)
    assert to_mcore(source, tmp_path / "ours", *options) == (2 if outcome else 0)
    assert (outcome or "") in capsys.readouterr().err


def test_the_mask_of_a_tokenizer_given_on_the_way_out_is_checked(tmp_path: Path, capsys) -> None:
    source = checkpoints.write(tmp_path / "source", "llada2")
    assert to_mcore(source, tmp_path / "ours") == 0
    for special, code in (({257: "<|role_end|>"}, 2), ({257: "<|mask|>"}, 0)):
        folder = tmp_path / f"tokenizer{code}"
        folder.mkdir()
        checkpoints.add_tokenizer(folder, special)
        assert to_hf(tmp_path / "ours", tmp_path / f"back{code}", "--tokenizer", str(folder)) == code
    assert (tmp_path / "back0" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
