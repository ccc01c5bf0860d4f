"""`hf:DIR`: a Hugging Face folder is decoded as its conversion, and nothing is left behind."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llada_megatron import cli
from tests.convert import published_forward
from tests.convert.checkpoints import MASK, add_tokenizer, described, write

PROMPTS = ["--max-new-tokens", "6", "--threshold", "0.2", "--prompt", "word5 word6"]
WORDS = {MASK: "<|mask|>", 100: "<|endoftext|>"}


def folder(path: Path, kind: str, **changes) -> Path:
    """A Hugging Face folder whose config.json says what the writer of checkpoints leaves out."""
    source = write(path, kind)
    described = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": 64} | changes
    (source / "config.json").write_text(json.dumps(described))
    return source


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """Where temporary directories are made."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    return place


def test_a_folder_is_decoded_as_its_conversion_in_any_layout(tmp_path, temporary, capsys):
    source = add_tokenizer(folder(tmp_path / "hf", "llada2"), WORDS)
    before = sorted(path.name for path in source.iterdir())
    out = tmp_path / "out.jsonl"
    decoding = ["--block-size", "4", *PROMPTS, "--output", str(out)]
    assert cli.main(["generate", f"hf:{source}", *decoding]) == 0
    said = capsys.readouterr().err
    assert f"hf:{source}: LLaDA2MoeModelLM, mask token {MASK}; converted in" in said
    assert "with its certificate, logits differ by" in said
    directly = json.loads(out.read_text())
    assert directly["text"] == " ".join(f"word{token}" for token in directly["tokens"] if token not in WORDS)
    assert cli.main(["convert", "hf-to-mcore", "--from", str(source), "--to", str(tmp_path / "ckpt")]) == 0
    assert cli.main(["generate", str(tmp_path / "ckpt"), *decoding]) == 0
    assert json.loads(out.read_text())["tokens"] == directly["tokens"]
    assert cli.main(["generate", f"hf:{source}", *decoding, "layout.tp=2", "layout.ep=2"]) == 0
    assert json.loads(out.read_text())["tokens"] == directly["tokens"]
    assert sorted(path.name for path in source.iterdir()) == before
    assert not list(temporary.glob("llada_hf_*"))


def test_a_folder_of_a_model_that_fills_no_masks_writes_next_tokens_where_that_is_said(
    tmp_path, temporary, capsys
):
    source = add_tokenizer(folder(tmp_path / "hf", "llama"), WORDS)
    prompts, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts.write_text('{"tokens": [5, 6, 7]}\n')
    command = [
        "generate",
        f"hf:{source}",
        "--input",
        str(prompts),
        "--output",
        str(out),
        "--max-new-tokens",
        "6",
    ]
    assert cli.main(command) == 2
    assert "--rule ar if it predicts next tokens" in capsys.readouterr().err
    assert cli.main([*command, "--rule", "ar"]) == 0
    found, tokens = json.loads(out.read_text())["tokens"], [5, 6, 7]
    weights, (config, _) = load_file(source / "model.safetensors"), described("llama")
    for _ in found:
        logits_V = published_forward.logits(weights, config, torch.tensor(tokens), causal=True)[-1]
        logits_V[MASK] = -torch.inf
        tokens.append(int(logits_V.argmax()))
    assert tokens[3:] == found and len(found) == 6


def test_an_interrupted_command_goes_on_although_its_checkpoint_lies_elsewhere(tmp_path, temporary):
    from llada_megatron.commands import opened
    from llada_megatron.commands.generate import prepare
    from llada_megatron.generate.job import Job

    source = add_tokenizer(folder(tmp_path / "hf", "llada2"), WORDS)
    identities = set()
    for seed in ("1", "1", "2"):
        _, args = cli.parse("generate", [f"hf:{source}", *PROMPTS, "--seed", seed])
        with opened.opened(args) as checkpoint:
            identities.add(Job(**prepare(args, checkpoint)[1]).identity)
    assert len(identities) == 2


def test_the_mask_token_may_be_in_config_json_or_said(tmp_path, temporary):
    from llada_megatron.commands import opened

    source = folder(tmp_path / "hf", "llama", mask_token_id=17)
    for said, expected in (([], 17), (["--mask-token-id", "18"], 18)):
        _, args = cli.parse("generate", [f"hf:{source}", *PROMPTS, "--block-size", "8", *said])
        with opened.opened(args) as checkpoint:
            assert checkpoint.manifest.config["model"]["mask_token_id"] == expected


@pytest.mark.parametrize(
    ("kind", "change", "arguments", "said"),
    [
        (
            "bailing",
            {},
            [],
            "of architecture BailingMoeV2ForCausalLM, an autoregressive model, which has not",
        ),
        ("llama", {}, [], "of architecture LlamaForCausalLM, an autoregressive model, which has not learnt"),
        ("llama", {}, ["--mask-token-id", "9"], "does not say its block size: give --block-size if"),
        (
            "llama",
            {"architectures": ["GPT2LMHeadModel"]},
            [],
            "not served: BailingMoeV2ForCausalLM, LLaDA2Mo",
        ),
        ("llada2", {}, [], "has no tokenizer.json to name the mask token: give --mask-token-id."),
        (
            "llada2",
            {"max_position_embeddings": None},
            ["--mask-token-id", "257"],
            "set data.sequence_length.",
        ),
        ("llada2", {}, ["--mask-token-id", "999"], "--mask-token-id 999 is outside the vocabulary of 288"),
        ("llada2", {}, ["--mask-token-id", "257", "model.layers=0"], "model.layers=0 is out of range"),
        ("qwen3", {}, ["--mask-token-id", "9", "--block-size", "4", "model.layers=5"], "model.experts is 0"),
    ],
    ids=["ling", "llama", "block_size", "architecture", "mask", "context", "vocabulary", "value", "model"],
)
def test_what_cannot_be_decoded_is_one_sentence(tmp_path, temporary, capsys, kind, change, arguments, said):
    source = folder(tmp_path / "hf", kind, **change)
    for verb in (["generate", "--prompt", "a"], ["chat"]):
        assert cli.main([*verb, f"hf:{source}", *arguments]) == 2
        error = capsys.readouterr().err
        assert said in error and "Traceback" not in error
        assert error.count("\n") == 1 + ("converted in" in error)
    assert not list(temporary.glob("llada_hf_*"))


def test_a_model_of_next_tokens_is_asked_for_a_mask_token_by_its_reason(tmp_path, temporary, capsys):
    source = folder(tmp_path / "hf", "llama")
    assert cli.main(["generate", f"hf:{source}", "--prompt", "a", "--rule", "ar"]) == 2
    assert "names no mask token" in capsys.readouterr().err


def test_a_folder_of_llada_says_its_context_under_its_own_key(tmp_path, temporary):
    from llada_megatron.commands import opened
    from llada_megatron.commands.generate import configuration

    source = write(tmp_path / "hf", "llada")  # max_sequence_length, and no max_position_embeddings
    _, args = cli.parse("generate", [f"hf:{source}", *PROMPTS])
    with opened.opened(args) as checkpoint:
        assert configuration(checkpoint, []).data.sequence_length == 64


def test_a_conversion_that_fails_its_certificate_is_not_decoded(tmp_path, temporary, capsys):
    from safetensors.torch import load_file, save_file

    source = add_tokenizer(folder(tmp_path / "hf", "llada2"), WORDS)
    weights = load_file(source / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert cli.main(["generate", f"hf:{source}", *PROMPTS]) == 2
    error = capsys.readouterr().err
    assert "fails its certificate" in error and "model.norm.weight" in error


def test_only_a_folder_of_others_is_told_its_mask(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path), "--prompt", "a", "--mask-token-id", "3"]) == 2
    assert "are for hf:DIR: a checkpoint says its mask token." in capsys.readouterr().err
    assert cli.main(["generate", "hf:nowhere", "--prompt", "a"]) == 2
    assert "nowhere/config.json" in capsys.readouterr().err
