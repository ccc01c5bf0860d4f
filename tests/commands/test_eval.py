"""`llada eval`: a user's tasks end to end; killed it goes on; what does not fit is a sentence."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llada_megatron import cli
from llada_megatron.record.manifest import find
from tests.harness.questions import CHOOSES, CONTINUES, GENERATES, QUESTIONS, ROLLS, folder_of

OLD = Path(__file__).parents[1] / "old_run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("eval") / "old"
    shutil.copytree(OLD, folder)
    return str(folder / "run")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    tasks = {"writes": GENERATES, "chooses": CHOOSES, "continues": CONTINUES, "rolls": ROLLS}
    return str(folder_of(tmp_path_factory.mktemp("tasks"), **tasks))


def evaluated(run: str, output: Path, *arguments: str) -> dict[str, Any]:
    assert cli.main(["eval", run, "--json", str(output), *arguments]) == 0
    assert not list(output.parent.glob("*.partial"))
    return json.loads(output.read_text())


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in output.with_suffix(".samples.jsonl").read_text().splitlines()]


def test_a_users_tasks_of_every_kind_are_scored_in_lm_evals_form(run, folder, tmp_path, capsys):
    output = tmp_path / "scores.json"
    tasks = ["--tasks", "writes,chooses,continues,rolls", "--include-path", folder]
    found = evaluated(run, output, *tasks, "--threshold", "0.01", "--draws", "4")
    printed = capsys.readouterr().out
    assert "threshold,threshold=0.01" in printed and "bits_per_byte" in printed
    assert found["results"]["writes"]["exact_match,none"] == 0.0
    assert found["n-samples"]["rolls"] == {"original": 4, "effective": 4}
    assert found["results"]["rolls"]["bits_per_byte,none"] == pytest.approx(8.06, abs=0.3)  # 260 words
    assert (
        0 <= found["results"]["chooses"]["acc,none"] <= 1 and "acc_stderr,none" in found["results"]["chooses"]
    )
    assert found["results"]["continues"]["perplexity,none"] > 1
    cost = found["llada"]["cost"]
    assert cost["writes"]["texts"] == 4 and cost["writes"]["batched_forwards"] >= 1
    assert cost["writes"]["ms_per_forward"] > 0 and cost["writes"]["forwards"]["denoise"] >= 4
    assert cost["chooses"]["likelihoods"] == 9 and cost["chooses"]["nats_se"] > 0
    for each in samples(output):
        if each["task"] == "writes":
            ((text,),) = each["resps"]
            assert "e" not in text and len(text.encode()) <= 9 * 3
        if each["task"] == "chooses":
            nats = [float(choice[0][0]) for choice in each["resps"]]
            assert all(
                -7.5 * len(choice.encode()) - 8 < n < -3 * len(choice.encode())
                for n, choice in zip(nats, each["doc"]["choices"], strict=True)
            )


@pytest.mark.slow
def test_every_layout_gives_the_results_of_one_process(folder, tmp_path):
    model = str(tmp_path / "model")
    convert = [
        "convert",
        "hf-to-mcore",
        "--from",
        str(OLD.parent / "golden"),
        "--to",
        model,
        "--mask-token-id",
        "500",
    ]
    assert cli.main(convert) == 0
    tasks = ["--tasks", "writes,chooses,continues", "--include-path", folder, "--draws", "2"]
    options = [*tasks, "--threshold", "0.01", "--temperature", "0.7", "--block-size", "8"]
    settings = ["data.tokenizer=bytes", "data.sequence_length=64", "precision.dtype=fp32"]
    alone = evaluated(model, tmp_path / "one.json", *options, *settings)
    expected = samples(tmp_path / "one.json")
    for layout in ("processes=2", "tp=2", "ep=2"):
        output = tmp_path / f"{layout}.json"
        found = evaluated(model, output, *options, "--batch", "2", *settings, f"layout.{layout}")
        for task, figures in alone["results"].items():
            for name, value in figures.items():
                same = value if isinstance(value, str) else pytest.approx(value, rel=1e-2)
                assert found["results"][task][name] == same
        for one, other in zip(expected, samples(output), strict=True):
            if one["task"] == "writes":
                assert one["resps"] == other["resps"]
            else:
                pairs = zip(one["filtered_resps"], other["filtered_resps"], strict=True)
                assert all(math.isclose(float(a[0]), float(b[0]), abs_tol=1e-2) for a, b in pairs)


@pytest.mark.slow
def test_a_killed_command_goes_on_without_asking_again(run, tmp_path):
    many = [{**QUESTIONS[n % 4], "question": f"{n} "} for n in range(16)]
    folder = folder_of(tmp_path / "tasks", many, writes=GENERATES, continues=CONTINUES)
    output, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    options = ["--tasks", "writes,continues", "--include-path", str(folder), "--rule", "threshold,quota"]
    command = ["eval", run, "--json", str(output), *options, "--batch", "1", "--draws", "2"]
    with subprocess.Popen([sys.executable, "-m", "llada_megatron", *command]) as process:
        while not partial.exists() or len(partial.read_text().splitlines()) < 25:
            assert process.poll() is None
            time.sleep(0.01)
        ranks = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(ranks, timeout=60)  # they end with it, and may write until then
    assert not left
    head, *lines = partial.read_text().splitlines(keepends=True)
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    assert 24 <= len(whole) < 64 and not output.exists()
    whole[10] |= {"nats": -1.0}
    if "text" in whole[-1]:
        whole[-1] |= {"text": "kept"}
    partial.write_text(head + "".join(json.dumps(each) + "\n" for each in whole) + '{"kind": "gen')
    assert cli.main([*command[:-1], "4"]) == 2  # other draws are another command's
    assert cli.main(command) == 0 and not partial.exists()
    for name in ("threshold", "quota"):
        results = json.loads((tmp_path / f"out.{name}.json").read_text())
        assert results["n-samples"]["writes"]["effective"] == 16
        answers = {
            (each["task"], each["doc_id"]): each["resps"] for each in samples(tmp_path / f"out.{name}.json")
        }
        assert answers["continues", 10] == [[[-1.0, False]]]
        last = whole[-1]
        assert (
            last.get("text") is None
            or last["decoding"] != name
            or answers["writes", last["number"]] == [["kept"]]
        )


@pytest.mark.slow
def test_an_autoregressive_checkpoint_has_exact_likelihoods_and_writes_next_tokens(
    run, folder, tmp_path, capsys
):
    copy = tmp_path / "ar"
    shutil.copytree(run, copy)
    checkpoint = find(str(copy))
    replace(checkpoint.manifest, stage="ar", block_size=1).write(checkpoint.path)
    options = ["--tasks", "rolls,continues,chooses,writes", "--include-path", folder]
    found = evaluated(str(copy), tmp_path / "ar.json", *options)
    assert found["llada"]["decoding"]["rule"] == "ar"
    cost = found["llada"]["cost"].pop("writes")
    assert cost["texts"] == 4 and cost["tokens_per_forward"] == 1
    assert found["llada"]["block_size"] == 0
    assert all(cost["nats_se"] == 0 for cost in found["llada"]["cost"].values())
    assert found["results"]["rolls"]["bits_per_byte,none"] == pytest.approx(8.06, abs=0.3)
    assert cli.main(["eval", str(copy), *options, "--rule", "threshold,factor"]) == 2
    assert "--rule threshold,factor: " in capsys.readouterr().err


@pytest.mark.slow
def test_a_chat_asks_what_llada_generate_asks(run, tmp_path):
    folder = folder_of(tmp_path / "tasks", writes=GENERATES)
    output = tmp_path / "chat.json"
    options = ["--tasks", "writes", "--include-path", str(folder), "--chat", "--chat-template", "plain"]
    evaluated(run, output, *options, "--limit", "1", "--max-new-tokens", "4", "--stop", "z")
    (sample,) = samples(output)
    command = ["generate", run, "--chat", "--chat-template", "plain", "--prompt", "The cat", "--stop", "e"]
    lines = tmp_path / "lines.jsonl"
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(json.dumps({"prompt": "The cat"}) + "\n")
    command = [*command[:5], "--input", str(prompts), "--output", str(lines), "--max-new-tokens", "4"]
    assert cli.main([*command, "--stop", "\n\n", "--stop", "e", "--stop", "z"]) == 0
    assert sample["resps"][0][0] == json.loads(lines.read_text())["text"]
    assert sample["arguments"][0][0] != "The cat" and "The cat" in sample["arguments"][0][0]


FAULTS = [
    (["--tasks", "write"], "There is no task write: did you mean writes"),
    (["--tasks", "writes", "--rule", "best"], "There is no rule 'best': give threshold, "),
    (["--tasks", "writes", "--rule", "factor", "--threshold", "0.5"], "threshold is no setting of factor"),
    (
        [
            *["--tasks", "writes", "--rule", "indel", "--limit", "1"],
            "levenshtein.delete_token_id=258",
            "levenshtein.split_token_id=257",
        ],
        "Rule indel has delete_id 258 and split_id 257 beside the mask token 257",
    ),
    (["--tasks", "writes", "--draws", "3"], "--draws 3: give 1 or an even number"),
    (["--tasks", "writes", "--limit", "0"], "--limit 0: give a number of questions"),
    (["--tasks", "writes", "--max-new-tokens", "32"], "the model's context is 32: give fewer"),
    (["--tasks", "writes", "--include-path", "nowhere"], "--include-path nowhere is no folder"),
    (["--tasks", "writes", "layout.pp=2"], "Decoding serves tp, ep and dp, not pp: set layout.pp=1."),
    ([], "Give a checkpoint and --tasks"),
]


@pytest.mark.parametrize(("arguments", "said"), FAULTS, ids=[said for _, said in FAULTS])
def test_what_does_not_fit_is_one_sentence(run, folder, capsys, arguments, said, monkeypatch):
    from llada_megatron.harness import tasks

    manager = tasks._manager
    monkeypatch.setattr(tasks, "_manager", lambda folders, stock: manager(folders, stock=False))  # seconds
    assert cli.main(["eval", run, "--include-path", folder, *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_tasks_of_a_folder_are_listed(folder, capsys):
    assert cli.main(["eval", "--list", "--include-path", folder]) == 0
    assert "writes  generate_until\n" in capsys.readouterr().out
