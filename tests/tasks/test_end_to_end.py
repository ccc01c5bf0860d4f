"""Every kind of task through `llada eval` with a model that knows nothing, and then `llada report`."""

import json
import shutil
from pathlib import Path

import pytest

from llada_megatron.cli import main
from llada_megatron.tasks import code_execution
from llada_megatron.tasks.data_packages import FOLDER
from llada_megatron.tasks.texts import VARIABLE

OLD = Path(__file__).parents[1] / "old_run"
TASKS = ("gsm8k", "humaneval", "reasoning_gym:chain_sum", "arc_like", "perplexity")


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the packages that `make eval-data` installs")
def test_tasks_are_asked_and_scored_and_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(code_execution, "_allowed", False)
    shutil.copytree(OLD, tmp_path / "old")
    (tmp_path / "text.txt").write_text("A text that nobody has seen.")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "text.txt"))
    command = ["eval", str(tmp_path / "old" / "run"), "--tasks", ",".join(TASKS), "--limit", "2"]
    options = ["--max-new-tokens", "16", "--threshold", "0.1,0.9", "--draws", "2"]
    output = ["--json", str(tmp_path / "scores" / "old.json")]
    assert main([*command, *options, *output]) == 2
    assert "allow it with --allow-code" in capsys.readouterr().err
    assert main([*command, *options, *output, "--allow-code"]) == 0
    files = sorted((tmp_path / "scores").glob("*.json"))
    assert len(files) == 2
    for file in files:
        results = json.loads(file.read_text())
        assert {*results["results"]} == {*TASKS}
        for task in TASKS:
            assert results["n-samples"][task]["effective"] == (1 if task == "perplexity" else 2)
        assert results["results"]["gsm8k"]["exact_match,strict-match"] == 0.0
        assert results["results"]["humaneval"]["pass@1,none"] == 0.0
        assert results["llada"]["cost"]["humaneval"]["tokens_per_forward"] >= 1.0
    assert main(["report", "--compare", str(tmp_path / "scores"), "--out", str(tmp_path / "page")]) == 0
    assert "pass@1" in capsys.readouterr().out
    content = json.loads((tmp_path / "page" / "comparison.json").read_text())
    assert {line["task"]: len(line["points"]) for line in content["frontiers"]} == dict.fromkeys(TASKS[:3], 2)
