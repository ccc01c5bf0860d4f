"""Results of evaluations side by side."""

import json
from pathlib import Path

import pytest

from llada_megatron.cli import main
from llada_megatron.config.errors import BAD_INPUT, BadInput
from llada_megatron.observe.compared_runs import files_in, write_comparison
from llada_megatron.observe.comparison import compared
from llada_megatron.observe.frontier import Point, aup
from tests.observe.evaluations import likelihoods, results, write
from tests.observe.runs import make_run


def test_a_line_is_a_model_under_a_rule_and_its_points_are_the_settings(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        results("runs/a", "threshold", "0.9", accuracy=0.80, speed=2.0),
        results("runs/a", "threshold", "0.5", accuracy=0.77, speed=4.0),
        results("runs/a", "factor", "1", accuracy=0.6, speed=3.0),
        results("runs/b", "threshold", "0.9", accuracy=0.85, speed=1.5),
        likelihoods("runs/a"),
    )
    lines = compared(paths).lines
    strict = [line for line in lines if line.metric == "exact_match,strict-match"]
    assert [(line.model, line.rule, len(line.points)) for line in strict] == [
        ("runs/a", "factor", 1),
        ("runs/a", "threshold", 2),
        ("runs/b", "threshold", 1),
    ]
    first = strict[1].points[0]
    assert first == Point(2.0, pytest.approx(80.0), pytest.approx(1.0), "threshold,threshold=0.9")  # type: ignore[arg-type]
    assert strict[1].aup == aup(strict[1].points, best=85.0)  # the best of the page, which another model has
    (_, flexible, *_) = [line for line in lines if line.metric == "exact_match,flexible-extract"]
    assert flexible.points[0].error is None


def test_the_page_has_every_score_and_a_picture_of_each_task_that_was_decoded(tmp_path: Path) -> None:
    write(
        tmp_path,
        results("runs/a", "threshold", "0.9", accuracy=0.80, speed=2.0),
        results("runs/b", "threshold", "0.9", accuracy=0.5, speed=3.0, task="reasoning_gym:chain_sum"),
        likelihoods("runs/a"),
    )
    folder = tmp_path / "page"
    content = write_comparison([tmp_path], folder)
    assert json.loads((folder / "comparison.json").read_text()) == content
    page = (folder / "index.html").read_text()
    assert {picture.name for picture in folder.glob("*.png")} == {
        "frontier-gsm8k.png",
        "frontier-reasoning_gym-chain_sum.png",
    }
    for text in ("frontier-gsm8k.png", "0.8000 ± 0.0100", "0.8500", "7.2", "40 denoise", "160.0", "1.2500"):
        assert text in page
    assert "(lower is better)" in page
    assert "store" not in page  # there was none
    assert "d3LLM" in (folder / "comparison.md").read_text()


def test_results_of_other_models_are_scores_without_a_cost(tmp_path: Path) -> None:
    (path,) = write(tmp_path, {"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": 0.1}}})
    found = compared([path])
    (score,) = found.scores
    assert (score.model, score.metric, score.value, score.error, score.cost) == ("0", "acc", 0.5, 0.1, {})
    assert found.lines == found.answers == []


def test_likelihoods_are_of_no_decoding_and_come_once(tmp_path: Path) -> None:
    both = [results("runs/a", "threshold", setting, accuracy=0.5, speed=2.0) for setting in ("0.5", "0.9")]
    for one in both:
        for part, content in likelihoods("runs/a").items():
            one[part] |= content if part != "llada" else {"cost": one[part]["cost"] | content["cost"]}
    content = write_comparison(write(tmp_path, *both), tmp_path / "page")
    found = [
        (score["task"], score["decoding"]) for score in content["scores"] if score["task"] == "perplexity"
    ]
    assert found == [("perplexity", "")]
    assert len(content["scores"]) == 5


def test_runs_bring_their_scores_their_bounds_and_what_they_wrote(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stop_after=80)
    without = make_run(tmp_path / "without", stop_after=3, evaluated=False)
    said = results("runs/a", "joint", "0.9", accuracy=0.8, speed=2.0)
    said["llada"]["shown"] = {
        "gsm8k": [
            {
                "question": "1 + 2 <b>?",
                "target": "3",
                "scores": {"exact_match": 1.0},
                "pieces": ["3", ".", "0"],
                "decided_at": [1, 2, 2],
                "is_edited": [False, True, True],
            }
        ]
    }
    (run / "eval").mkdir()
    write(run / "eval", said)
    content = write_comparison([run, without], tmp_path / "page")
    assert [score["model"] for score in content["scores"]] == ["runs/a"] * 2
    assert [stage["stage"] for stage in content["stages"]] == ["init", "warmup-1", "warmup-4"]
    bound = content["stages"][1]["bound"]["32"]
    page = (tmp_path / "page" / "index.html").read_text()
    assert f"{bound['mean']:.4f} ± {bound['se']:.4f}" in page
    assert '<mark class="t0">3</mark>' in page and "<ins>.0</ins>" in page
    assert "1 + 2 &lt;b&gt;? (right: 3)" in page and "runs/a, joint,threshold=0.9: exact_match 1" in page


def test_what_holds_no_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(
        BadInput, match=r"a\.json has no 'results': give files that `llada eval --json` wrote"
    ):
        write_comparison([tmp_path / "a.json"], tmp_path / "page")
    assert not (tmp_path / "page").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty holds no \.json file"):
        files_in([tmp_path / "empty"])
    with pytest.raises(BadInput, match=r"missing\.json does not exist"):
        write_comparison([tmp_path / "missing.json"], tmp_path / "page")


def test_the_verb_prints_the_scores_and_wants_either_a_run_or_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write(tmp_path, results("runs/a", "threshold", "0.9", accuracy=0.80, speed=2.0))
    page, copy = tmp_path / "page", tmp_path / "copy.json"
    assert main(["report", "--compare", str(paths[0]), "--out", str(page), "--json", str(copy)]) == 0
    said = capsys.readouterr().out
    assert "AUP 160.0: runs/a, threshold, gsm8k (exact_match,strict-match)" in said
    assert str(page / "index.html") in said
    assert copy.read_text() == (page / "comparison.json").read_text()
    assert main(["report"]) == BAD_INPUT
    assert main(["report", str(tmp_path), "--compare", str(paths[0])]) == BAD_INPUT
    assert main(["report", str(tmp_path), "--out", str(page)]) == BAD_INPUT
