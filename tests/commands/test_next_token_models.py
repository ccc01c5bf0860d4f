"""A model that predicts next tokens, here of the family dlcm, in every verb that decodes or scores."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from llada_megatron import cli
from llada_megatron.commands import chat
from llada_megatron.record.manifest import find
from tests.corpus import corpus  # noqa: F401 - a fixture
from tests.harness.questions import CHOOSES, CONTINUES, GENERATES, ROLLS, folder_of
from tests.training.runs import train
from tests.training.test_concepts import concepts


@pytest.fixture(scope="module")
def run(corpus: str, tmp_path_factory: Any) -> str:  # noqa: F811 - the fixture
    folder = tmp_path_factory.mktemp("dlcm") / "run"
    stages = "schedule.stages=[{name: c, objective: concepts, block_size: '1', tokens: 1024}]"
    train(concepts(corpus, f"run.dir={folder}", stages, "model.init_std=0.3"))
    return str(folder)


def test_prompts_are_continued_alike_alone_together_and_on_two_processes(run: str, tmp_path: Path) -> None:
    prompts = tmp_path / "in.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("masked tokens", "a", "né")))
    written = []
    for number, options in enumerate((["--batch", "1"], [], ["layout.processes=2"])):
        output = tmp_path / f"{number}.jsonl"
        command = ["generate", run, "--input", str(prompts), "--output", str(output), "--max-new-tokens", "9"]
        assert cli.main([*command, "--temperature", "0.9", "--top-k", "50", *options]) == 0
        written.append([json.loads(line) for line in output.read_text().splitlines()])
    for lines in written:
        assert [line["tokens"] for line in lines] == [line["tokens"] for line in written[0]]
        for line in lines:
            assert line["forwards"]["denoise"] == len(line["tokens"])
            assert line["decided_at"] == [*range(1, 1 + len(line["tokens"]))]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--rule", "threshold"], "--rule threshold: "),
        (["--block-size", "4", "--cuda-graphs"], "--block-size, --cuda-graphs: "),
        (["--full-attention", "--cache", "dual"], "--full-attention, --cache: "),
        (["layout.bp=2", "layout.processes=2"], "layout.bp=2: "),
        (["--threshold", "0.5"], "Rule ar has no setting threshold"),
        (["--buffer", "4"], "predicts next tokens has no blocks"),
        (["layout.processes=2", "layout.ep=2"], "set layout.ep and layout.etp"),
        (["--max-cached-tokens", "8"], "max_cached_tokens is 8"),
    ],
)
def test_what_is_for_models_that_fill_masks_is_one_sentence(
    run: str, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", run, "--prompt", "a", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_the_bound_is_refused_and_an_empty_prompt(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score", run, "corpus"]) == 2
    assert "A score by the bound fills masks" in capsys.readouterr().err
    assert cli.main(["generate", run, "--prompt", ""]) == 2
    assert "Prompt 0 is empty" in capsys.readouterr().err


def test_tasks_get_exact_likelihoods_and_texts(run: str, tmp_path: Path) -> None:
    tasks = {"writes": GENERATES, "chooses": CHOOSES, "continues": CONTINUES, "rolls": ROLLS}
    folder, output = folder_of(tmp_path / "tasks", **tasks), tmp_path / "scores.json"
    command = ["eval", run, "--tasks", ",".join(tasks), "--include-path", str(folder)]
    assert cli.main([*command, "--json", str(output)]) == 0
    said = json.loads(output.read_text())["llada"]
    assert said["block_size"] == 0 and said["decoding"]["rule"] == "ar"
    assert said["cost"]["writes"]["texts"] == 4 and said["cost"]["writes"]["tokens_per_forward"] == 1
    assert said["cost"]["chooses"]["nats_se"] == 0 and said["cost"]["chooses"]["likelihoods"] == 9


def test_a_chat_answers_with_next_tokens(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "open", lambda *_, **__: io.StringIO("ab\ncd\n"), raising=False)
    command = ["chat", run, "--max-new-tokens", "5", "--chat-template", "plain"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2 and "2 answers, " in printed.err
    assert "1.00 a forward" in printed.err
    _, args = cli.parse("chat", command[1:])
    assert "next tokens, rule ar" in chat.prepare(args, find(run))[2]


@pytest.mark.parametrize("is_run", [True, False], ids=["run", "first weights"])
def test_the_benchmark_refuses_another_rule_by_its_own_option(
    run: str, is_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    source = run if is_run else "model=dlcm_parity"
    assert cli.main(["bench", "decode", source, "--rule", "threshold,factor"]) == 2
    error = capsys.readouterr().err
    name = f"{run}/checkpoints/" if is_run else "model.family=dlcm"
    assert f"--rule threshold,factor: {name}" in error and "--temperature" not in error


@pytest.mark.slow
def test_the_benchmark_compares_with_a_loop_that_computes_everything_anew(run: str, tmp_path: Path) -> None:
    few = ["--prompt-tokens", "12", "--new-tokens", "8", "--batch", "2"]
    assert cli.main(["bench", "decode", run, *few, "--json", str(tmp_path / "decode.json")]) == 0
    (one,) = json.loads((tmp_path / "decode.json").read_text())["rules"]
    assert one["tokens_equal"] and one["tokens_per_forward"] == 1 and 0 < one["backbone_share"] < 1
