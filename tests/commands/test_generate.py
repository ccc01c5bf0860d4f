"""`llada generate`: prompts in, lines out in their order, in any layout; what does not fit is a sentence."""

import json
import shutil
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.commands import generate

OLD = Path(__file__).parents[1] / "old_run"
RECORDS = [{"prompt": "The cat", "id": "a"}, {"prompt": ""}, {"tokens": [84, 104, 101]}, {"prompt": "né" * 3}]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("generate") / "old"
    shutil.copytree(OLD, folder)
    return str(folder / "run")


@pytest.fixture
def prompts(tmp_path) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return str(path)


def generated(run, prompts, output, *arguments: str) -> list[dict]:
    command = ["generate", run, "--input", prompts, "--output", str(output), "--max-new-tokens", "9"]
    assert cli.main([*command, *arguments]) == 0
    assert [path.name for path in output.parent.glob(f"{output.name}*")] == [output.name]
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_each_prompt_has_its_line_in_order_and_every_layout_gives_the_same(run, prompts, tmp_path):
    alone = generated(run, prompts, tmp_path / "one.jsonl", "--threshold", "0.01")
    assert [line["index"] for line in alone] == [0, 1, 2, 3]
    for record, line in zip(RECORDS, alone, strict=True):
        assert record.items() <= {**line, **record}.items()
        ids = line["tokens"]
        assert line["text"] == bytes(i for i in ids if i < 256).decode(errors="replace")
        assert (line["stop"] == "length" and len(ids) == 9) or (line["stop"] == "end" and ids[-1] == 256)
        assert line["forwards"]["denoise"] >= 1 and line["tokens_per_forward"] > 0
    assert alone[0]["id"] == "a" and alone[0]["prompt"] == "The cat"
    split = generated(
        run, prompts, tmp_path / "two.jsonl", "--threshold", "0.01", "layout.processes=2", "--batch=2"
    )
    assert [line["tokens"] for line in split] == [line["tokens"] for line in alone]


def test_an_interrupted_command_goes_on_with_what_is_done(run, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    whole = generated(run, prompts, output, "--temperature", "0.8", "--seed", "4")
    partial = tmp_path / "out.jsonl.partial"
    command = ["generate", run, "--input", prompts, "--output", str(output), "--max-new-tokens", "9"]
    head = interrupted(run, prompts, output, whole)
    partial.write_text(head + json.dumps(whole[2] | {"text": "kept"}) + "\n" + '{"index": 0, "te')
    assert cli.main([*command, "--temperature", "0.8", "--seed", "5"]) == 2
    assert "out.jsonl.partial holds results of another command" in capsys.readouterr().err
    again = generated(run, prompts, output, "--temperature", "0.8", "--seed", "4")
    assert again[2]["text"] == "kept"
    assert [line["tokens"] for line in again] == [line["tokens"] for line in whole]


def interrupted(run, prompts, output, whole) -> str:
    """The first line that the command leaves behind when it is interrupted."""
    from llada_megatron.commands.generate import prepare
    from llada_megatron.generate.job import Job
    from llada_megatron.record.manifest import find

    arguments = ["--input", prompts, "--output", str(output), "--max-new-tokens", "9"]
    # Neither graphs nor the batch decide the results.
    arguments += ["--cuda-graphs", "--batch", "3"]
    _, args = cli.parse("generate", [run, *arguments, "--temperature", "0.8", "--seed", "4"])
    return json.dumps({"job": Job(**prepare(args, find(run))[1]).identity}) + "\n"


def test_texts_are_printed_and_a_chat_is_rendered(run, capsys):
    assert cli.main(["generate", run, "--prompt", "One", "--prompt", "Two", "--max-new-tokens", "5"]) == 0
    plain = capsys.readouterr()
    assert "2 prompts, " in plain.err and "tokens/s" in plain.err
    assert cli.main(["generate", run, "--chat", "--prompt", "One", "--max-new-tokens", "5"]) == 0


def test_a_draft_is_mended_by_a_rule_that_edits(run, tmp_path):
    asked = [{"prompt": "One", "draft": "ab"}, {"prompt": "One", "draft": [97, 98]}, {"prompt": "One"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    leaves = ["--rule", "joint", "--edit-threshold", "1"]
    lines = generated(run, str(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", *leaves)
    assert [line["tokens"][:2] == [97, 98] for line in lines] == [True, True, False]
    assert lines[0]["draft"] == "ab" and lines[0]["tokens"] == lines[1]["tokens"]


def test_orders_are_those_of_the_checkpoint_where_none_are_given(run, capsys):
    """Its mask, 257, is given a second meaning here, which the rule refuses."""
    command = ["generate", run, "--prompt", "a", "--max-new-tokens", "4", "--rule", "indel"]
    said = ["levenshtein.delete_token_id=258", "levenshtein.split_token_id=257"]
    assert cli.main([*command, *said]) == 2
    assert "Rule indel has delete_id 258 and split_id 257 beside the mask" in capsys.readouterr().err
    assert cli.main([*command, "--split-id", "259", *said]) == 0


def test_the_options_are_the_settings_of_all_rules():
    from llada_megatron.generate.methods import METHODS, settings_of
    from llada_megatron.generate.rules import RULES

    names = [*RULES, *METHODS]
    assert set(generate.RULES) == set(names)
    assert set(generate.RULE_SETTINGS) == {setting for name in names for setting in settings_of(name)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--prompt", "a" * 33],
            "Prompt 0 has 33 tokens, and the model's context of 32 has no room",
        ),
        (["--prompt", "a", "--rule", "best"], "There is no rule 'best': give threshold, "),
        (["--prompt", "a", "--threshold", "1.5"], "threshold"),
        (["--prompt", "a", "--rule", "factor", "--threshold", "0.5"], "threshold"),
        (["--prompt", "a", "--batch", "0"], "--batch 0: give at least 1."),
        (["--prompt", "a", "--block-size", "0"], "--block-size 0: give at least 1."),
        (["--prompt", "a", "--cache", "dual"], "--cache: blocks of this model see no later one"),
        (["--prompt", "a", "--rule", "entropy", "--random-order", "true"], "Rule entropy goes by entropies"),
        (["--prompt", "a", "--max-cached-tokens", "8"], "takes 32 cached tokens"),
        (["--prompt", "a", "--cuda-graphs"], "CUDA graphs (--cuda-graphs) need a CUDA device, this is a CPU"),
        (["--prompt", "a", "layout.pp=2"], "Decoding serves tp, ep and dp, not pp: set layout.pp=1."),
        (["--prompt", "a", "layout.tp=3"], "layout.tp=3 does not divide"),
        (["--input", "nowhere.jsonl"], "nowhere.jsonl does not exist: give a file of prompts."),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, capsys, arguments, said):
    assert cli.main(["generate", run, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ('{"text": "a"}', "line 1 holds no prompt"),
        ('{"tokens": [1, 257]}', "Prompt 0 holds the mask token, 257, at position 1: remove it."),
        ('{"tokens": [260]}', "Prompt 0: `tokens` is no list of ids below 260."),
        ('{"prompt": 3}', "Prompt 0: `prompt` is not text."),
        ('{"prompt": "a", "draft": 3}', "Prompt 0: `draft` is not text."),
        ('{"prompt": "a", "draft": [260]}', "Prompt 0: `draft` is no list of ids below 260."),
        ('{"prompt": "a", "draft": "b"}', "Prompt 0 has a draft, which this rule would leave as it is"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "Prompt 0: it is a chat: give --chat."),
        ("", "holds no prompts"),
    ],
)
def test_a_file_of_something_else_is_one_sentence(run, tmp_path, capsys, line, said):
    (tmp_path / "in.jsonl").write_text(line + "\n")
    assert cli.main(["generate", run, "--input", str(tmp_path / "in.jsonl")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_weights_without_a_block_size_are_refused_and_another_one_is_a_warning(tmp_path, capsys):
    from dataclasses import replace

    from llada_megatron.commands.generate import block_size_for
    from llada_megatron.config.errors import BadInput
    from llada_megatron.record.manifest import find

    checkpoint = find(str(OLD / "run"))
    assert block_size_for(checkpoint, None) == 4 and capsys.readouterr().err == ""
    assert block_size_for(checkpoint, 8) == 8
    assert "--block-size 8 is not the 4 that the model was trained with last" in capsys.readouterr().err
    for change, said in (
        ({"config": {}, "stage": "", "block_size": 0}, "does not say its block size: give --block-size"),
        (
            {"config": {}, "stage": "", "block_size": 0, "lineage": {"architecture": "LlamaForCausalLM"}},
            "is of architecture LlamaForCausalLM, that of autoregressive models, and does not say",
        ),
    ):
        with pytest.raises(BadInput, match=said):
            block_size_for(replace(checkpoint, manifest=replace(checkpoint.manifest, **change)), None)
    dream = change | {"lineage": {"architecture": "DreamModel"}}
    with pytest.raises(BadInput, match="DreamModel, which reads the logits before a mask"):
        block_size_for(replace(checkpoint, manifest=replace(checkpoint.manifest, **dream)), 8)
    assert block_size_for(replace(checkpoint, manifest=replace(checkpoint.manifest, **change)), 8) == 8
    assert "that of autoregressive models: what follows means little" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "LLaDA2MoeModelLM", "LLaDAModelLM"])
def test_converted_weights_predict_next_tokens_where_that_is_said_and_they_fill_no_masks(architecture):
    from dataclasses import replace

    from llada_megatron.commands.generate import predicts_next
    from llada_megatron.record.manifest import find

    checkpoint = find(str(OLD / "run"))
    converted = {"config": {}, "stage": "", "block_size": 0, "lineage": {"architecture": architecture}}
    converted = replace(checkpoint, manifest=replace(checkpoint.manifest, **converted))
    assert predicts_next(converted, "ar") == (architecture == "LlamaForCausalLM")
    assert not predicts_next(converted) and not predicts_next(checkpoint, "ar")


def full_checkpoint(block_size=4):
    """A checkpoint of the old run, as if its last stage had blocks of its whole sequences of 4 tokens."""
    from dataclasses import replace

    from llada_megatron.record.manifest import find

    checkpoint = find(str(OLD / "run"))
    config = checkpoint.manifest.config
    changed = {**config, "data": {**config["data"], "sequence_length": 4}}
    return replace(checkpoint, manifest=replace(checkpoint.manifest, config=changed, block_size=block_size))


def full_arguments(*given):
    import argparse

    from llada_megatron.commands import full_attention

    parser = argparse.ArgumentParser()
    full_attention.add_arguments(parser)
    return parser.parse_args(given)


def test_what_the_last_stage_or_an_option_says_is_decoded_with_full_attention(capsys):
    from llada_megatron.commands.full_attention import is_full, settings_for
    from llada_megatron.commands.generate import block_size_for
    from llada_megatron.config.errors import BadInput

    assert is_full(full_checkpoint()) and not is_full(full_checkpoint(2)) and not is_full(full_checkpoint(0))
    every = full_arguments("--cache", "dual", "--cache-warmup", "2", "--cfg-scale", "1")
    expected = {"cache": "dual", "warmup": "2", "cfg_scale": "1"}
    assert settings_for(every, full_checkpoint()) == expected
    assert settings_for(full_arguments(), full_checkpoint()) == {}
    assert settings_for(full_arguments(), full_checkpoint(2)) is None
    for checkpoint in (full_checkpoint(2), None):
        with pytest.raises(BadInput, match="--cache, --cache-warmup, --cfg-scale: blocks of this model see"):
            settings_for(every, checkpoint)
    assert capsys.readouterr().err == ""
    assert settings_for(full_arguments("--full-attention"), full_checkpoint(0)) == {}
    assert capsys.readouterr().err == ""
    assert settings_for(full_arguments("--full-attention"), full_checkpoint(2)) == {}
    assert "the model was trained with blocks of 2 last, which see no later one" in capsys.readouterr().err
    assert block_size_for(full_checkpoint(), None, is_full=True) == 4  # no part of a context is larger
    assert block_size_for(full_checkpoint(0), None, is_full=True) == 4
    assert block_size_for(full_checkpoint(), 2, is_full=True) == 2 and capsys.readouterr().err == ""


def test_full_attention_is_asked_for_with_its_cache(run, capsys):
    arguments = ["generate", run, "--prompt", "a", "--max-new-tokens", "6", "--full-attention"]
    assert cli.main([*arguments, "--cache", "dual", "--cfg-scale", "0.5"]) == 0
    said = capsys.readouterr()
    assert "1 prompt, " in said.err and said.out.strip()


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.slow
def test_a_hugging_face_folder_is_decoded_as_the_public_code_decodes_it(tmp_path, capsys):
    """The reference's `generate` on its own checkpoint (tests/golden/README.md)."""
    from safetensors import safe_open

    cases = json.loads((GOLDEN / "cases.json").read_text())
    name, case = next(
        (name, case)
        for name, case in cases["generation"].items()
        if case["eos_id"] >= 1_000_000 and case["steps"] == case["block_length"]
    )
    with safe_open(str(GOLDEN / "cases.safetensors"), "np") as tensors:
        prompt, expected = (
            tensors.get_tensor(f"gen.{name}.{part}").tolist() for part in ("prompt", "output")
        )
    (tmp_path / "in.jsonl").write_text(json.dumps({"tokens": prompt}))
    command = ["generate", f"hf:{GOLDEN}", "--input", str(tmp_path / "in.jsonl"), "--rule", "quota"]
    options = {
        "--max-new-tokens": len(expected),
        "--block-size": case["block_length"],
        "--threshold": case["threshold"],
        "--output": tmp_path / "out.jsonl",
    }
    command += ["--mask-token-id", str(cases["mask_token_id"])]
    command += [str(part) for pair in options.items() for part in pair]
    assert cli.main(command) == 0
    line = json.loads((tmp_path / "out.jsonl").read_text())
    assert line["tokens"] == expected and line["text"] is None
    assert line["forwards"]["denoise"] == case["n_forward"]
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "text"}))
    assert cli.main(command) == 2
    assert "Prompt 0: no tokenizer.json came with the checkpoint" in capsys.readouterr().err
