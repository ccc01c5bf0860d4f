"""An export describes the tensors that it holds, and says what it lacks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llada_megatron.commands.generate import configuration
from llada_megatron.record.manifest import find
from tests.convert import checkpoints
from tests.convert.test_round_trip import certificate, to_hf, to_mcore

QUANTIZED = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def configured(folder: Path, **settings: object) -> Path:
    described = json.loads((folder / "config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def exported(folder: Path, *options: str) -> dict:
    """config.json of a checkpoint that went in and out."""
    assert to_mcore(folder / "source", folder / "ours") == 0
    assert to_hf(folder / "ours", folder / "back", *options) == 0
    return json.loads((folder / "back" / "config.json").read_text())


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_config_json_says_of_quantisation_stays_behind_where_no_tensor_is_quantised(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.write(tmp_path / "source", "llama")
    before = json.loads((source / "config.json").read_text())
    configured(source, **{key: QUANTIZED["quantization_config"]})
    assert exported(tmp_path) == before
    assert f"config.json has {key} and no tensor is quantised" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("said", "keys"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype"}),
        ({"torch_dtype": "float32", "dtype": "float32"}, {"dtype", "torch_dtype"}),
        ({"torch_dtype": None}, {"torch_dtype"}),
    ],
)
def test_the_type_that_is_stated_is_that_of_the_tensors(said: dict, keys: set[str], tmp_path: Path) -> None:
    configured(checkpoints.write(tmp_path / "source", "llada2"), **said)
    described = exported(tmp_path)
    assert {"dtype", "torch_dtype"} & described.keys() == keys
    assert {described[key] for key in keys} == {"bfloat16"}


def test_tensors_of_two_types_are_described_by_the_one_of_most_numbers_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.write(tmp_path / "source", "llama")
    weights = load_file(source / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].float()
    save_file(weights, source / "model.safetensors")
    assert exported(tmp_path)["torch_dtype"] == "bfloat16"
    numbers = weights["model.embed_tokens.weight"].numel()
    note = f"{numbers:,} numbers in float32: config.json says bfloat16"
    assert note in capsys.readouterr().out and note in "".join(certificate(tmp_path / "back")["notes"])
    assert to_hf(tmp_path / "ours", tmp_path / "one", "--dtype", "bf16") == 0
    assert not any("config.json says" in note for note in certificate(tmp_path / "one")["notes"])
    assert {t.dtype for t in load_file(tmp_path / "one" / "model.safetensors").values()} == {torch.bfloat16}


def test_ids_that_end_and_pad_a_text_stay(tmp_path: Path) -> None:
    source = configured(checkpoints.write(tmp_path / "source", "bailing"), eos_token_id=3, pad_token_id=5)
    generation = {"eos_token_id": [3, 7], "pad_token_id": 5, "top_p": 0.5}
    (source / "generation_config.json").write_text(json.dumps(generation))
    described = exported(tmp_path, "--architecture", "LLaDA2MoeModelLM")
    assert (described["eos_token_id"], described["pad_token_id"]) == (3, 5)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == generation


def test_rows_that_are_orders_travel_in_config_json(tmp_path: Path) -> None:
    orders = {"delete_token_id": 5, "split_token_id": 6}
    source = configured(checkpoints.write(tmp_path / "source", "llama"), **orders)
    before = json.loads((source / "config.json").read_text())
    assert exported(tmp_path) == before
    found = find(str(tmp_path / "ours"))
    assert found.manifest.config["levenshtein"] == orders
    as_used = configuration(found, ["data.sequence_length=32"])
    assert as_used.levenshtein.orders == {"delete_id": 5, "split_id": 6}
    trained = orders | {"split_token_id": 7}  # as a run says it
    replace(found.manifest, config=found.manifest.config | {"levenshtein": trained}).write(found.path)
    assert to_hf(tmp_path / "ours", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "config.json").read_text())
    assert again == before | trained | {"mask_token_id": again["mask_token_id"]}


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        ({"delete_token_id": 5}, "sets split_token_id=null: it must be a whole number"),
        ({"delete_token_id": 5, "split_token_id": 10**6}, "both must be below vocab_size="),
    ],
)
def test_orders_that_are_no_rows_are_refused(
    orders: dict, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(checkpoints.write(tmp_path / "source", "llama"), **orders)
    assert to_mcore(tmp_path / "source", tmp_path / "ours") == 2
    assert said in capsys.readouterr().err


def test_an_export_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoints.write(tmp_path / "source", "llama")
    (source / "tokenizer_config.json").write_text("{}")  # names no token
    exported(tmp_path)
    note = f"no tokenizer came with {tmp_path / 'ours'}: give its directory as --tokenizer"
    assert note in capsys.readouterr().out and note in certificate(tmp_path / "back")["notes"]


def test_every_tokenizer_file_travels_and_another_tokenizer_leaves_none_behind(
    tmp_path: Path,
) -> None:
    source = checkpoints.add_tokenizer(checkpoints.write(tmp_path / "source", "llama"), {})
    (source / "additional_chat_templates").mkdir()
    files = {
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "tokenizer.model.v3",
        "qwen.tiktoken",
    }
    for name in files:
        (source / name).write_text(f"this is {name}")
    exported(tmp_path)
    for name in files | {"tokenizer.json", "tokenizer_config.json"}:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert not any("tokenizer" in note for note in certificate(tmp_path / "back")["notes"])
    other = tmp_path / "other"
    other.mkdir()
    checkpoints.add_tokenizer(other, {})
    assert to_hf(tmp_path / "ours", tmp_path / "with_other", "--tokenizer", str(other)) == 0
    assert not any((tmp_path / "with_other" / name).exists() for name in files)


@pytest.mark.parametrize("given", ["nowhere", "source", "tokenizer.json"])
def test_a_tokenizer_that_is_given_must_be_one(
    given: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoints.write(tmp_path / "source", "llama")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert to_mcore(source, tmp_path / "ours") == 0
    assert to_hf(tmp_path / "ours", tmp_path / "back", "--tokenizer", str(tmp_path / given)) == 2
    assert "is no directory with a tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()
