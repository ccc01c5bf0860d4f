"""The report of synthetic runs: complete, running, and without experts or evaluations."""

import argparse
import json
import random

import numpy as np
import pytest

from llada_megatron.commands.report import add_arguments, print_summary, run
from llada_megatron.config.errors import BadInput
from llada_megatron.config.quantities import short_count
from llada_megatron.observe.parts import Decoded, Span
from llada_megatron.observe.plots import _running_mean, _spread
from llada_megatron.observe.report import write_report
from llada_megatron.record.run_dir import RunDir
from tests.observe.evaluations import results, write
from tests.observe.runs import LENGTH, SCHEDULE, STEP_TOKENS, evaluation, make_run


def read_texts(run_dir):
    return [(run_dir / "report" / name).read_text() for name in ("report.md", "index.html")]


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "synthetic_run")
    assert write_report(run_dir).page == run_dir / "report" / "index.html"
    return run_dir


def test_the_report_names_every_stage_in_both_formats(finished):
    for text in read_texts(finished):
        assert all(name in text for name in ["init", *(stage[0] for stage in SCHEDULE)])
        assert "The schedule is complete" in text


@pytest.mark.parametrize("name", ["loss.png", "bound.png", "loss_by_t.png", "expert_load.png", "layers.png"])
def test_the_report_shows_a_picture_that_is_not_blank(finished, name):
    image = pixels(finished / "report" / name)
    assert image.shape[1] == 1080 and image.std() > 0.02
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    assert all(name in text for text in read_texts(finished))


def test_report_json_has_the_documented_keys_and_numbers(finished):
    report = json.loads((finished / "report.json").read_text())
    assert set(report) == {
        "schema", "progress", "stages", "ar", "baselines", "vocab_size", "wall_sec", "tasks", "plan", "cost",
        "versions",
    }  # fmt: skip
    assert report["schema"] == 1
    assert [stage["name"] for stage in report["stages"]] == ["init", *(stage[0] for stage in SCHEDULE)]
    assert all(
        set(stage) == {"name", "block_size", "tokens", "train_loss", "bound"} for stage in report["stages"]
    )
    stages = {stage["name"]: stage for stage in report["stages"]}
    assert list(stages["stable"]["bound"]) == ["1", "4", "32", str(LENGTH)]
    assert set(stages["stable"]["bound"]["4"]) == {"mean", "se"}
    assert (stages["stable"]["block_size"], stages["stable"]["tokens"]) == (LENGTH, 80 * STEP_TOKENS)
    assert report["ar"] == {"nll": 1.7, "tokens": 60 * STEP_TOKENS}
    assert report["baselines"] == {"unigram": 4.2, "bigram": 2.9}
    assert (report["vocab_size"], report["wall_sec"]) == (512, 424.0)
    assert set(report["versions"]) == {"python", "torch", "megatron-core", "numpy", "hydra-core"}


def test_a_later_evaluation_of_a_stage_replaces_the_earlier_one(tmp_path):
    run_dir = make_run(tmp_path / "run")
    with (run_dir / "evaluations.jsonl").open("a") as file:
        newer = evaluation("decay-32", "diffusion", 32, 250, 251, 21, 0.5, random.Random(1))
        file.write(json.dumps(newer) + "\n")
    write_report(run_dir)
    stages = json.loads((run_dir / "report.json").read_text())["stages"]
    assert [stage["bound"]["1"]["mean"] for stage in stages if stage["name"] == "decay-32"] == [
        newer["bound"]["1"]["mean"]
    ]


def test_a_running_run_without_evaluations_says_not_yet_and_invents_nothing(tmp_path):
    run_dir = make_run(tmp_path / "run", stop_after=70, evaluated=False)
    write_report(run_dir)
    markdown, page = read_texts(run_dir)
    assert "The schedule is not complete" in markdown
    assert "not yet" in markdown and "not yet" in page
    bounds = [line.rpartition(" | ")[2] for line in markdown.splitlines() if line.startswith("| warmup-4 | ")]
    assert "| training loss | bound |" in markdown and "not yet |" in bounds
    assert f"| pretrain | 1 | {short_count(60 * STEP_TOKENS)} | not yet | - |" in markdown
    assert not (run_dir / "report" / "bound.png").exists() and "bound.png" not in page
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["ar"], report["baselines"], report["wall_sec"]) == (None, None, None)
    assert [stage["tokens"] // STEP_TOKENS for stage in report["stages"]] == [60, 8, 2, 0, 0, 0, 0, 0, 0]
    assert all(stage["bound"] == {} and stage["train_loss"] is None for stage in report["stages"])


def test_a_run_of_one_step_of_an_autoregressive_model_without_experts_gives_a_report(tmp_path):
    run_dir = make_run(tmp_path / "run", schedule=SCHEDULE[:1], stop_after=1, evaluated=False, experts=0)
    write_report(run_dir)
    markdown, page = read_texts(run_dir)
    assert "the model has no experts" in markdown
    assert "training loss | bound" not in markdown and "The bound at the end" not in page
    assert "there is no bound" in page and "None: no stage fills masks" in page
    assert sorted(file.name for file in (run_dir / "report").glob("*.png")) == ["loss.png"]


def test_a_directory_that_is_no_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.yaml; give a run\.dir"):
        write_report(tmp_path / "missing")
    make_run(tmp_path / "new", stop_after=0, evaluated=False)
    with pytest.raises(BadInput, match=r"no metrics\.jsonl with a step in it"):
        write_report(tmp_path / "new")


def test_labels_are_moved_apart_in_their_order_and_stay_in_the_picture():
    places = np.array([0.99, 0.5, 0.51, 0.98, 0.1])
    moved = _spread(places, 0.06)
    assert (np.argsort(moved) == np.argsort(places)).all()
    assert np.diff(np.sort(moved)).min() >= 0.06 - 1e-12 and moved.max() <= 1 and moved[4] == 0.1


def test_the_running_mean_skips_what_is_missing():
    values = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan])
    assert _running_mean(values).tolist()[:4] == [1.0, 2.0, 3.0, 3.0]
    assert np.isnan(_running_mean(values)[-1])


def test_the_command_prints_a_table_of_80_columns_and_copies_the_json(
    finished, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args([str(finished), "--json", str(tmp_path / "out" / "copy.json")])) == 0
    assert (tmp_path / "out" / "copy.json").read_text() == (finished / "report.json").read_text()
    out = capsys.readouterr().out
    table = out[: out.index("Report:")]
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table
    assert all(
        name in table for name in ["init", *(stage[0] for stage in SCHEDULE), "AR NLL", "bigram", "unigram"]
    )
    assert f" @{LENGTH}" in table and "at most 0.0120" in table
    assert str(finished / "report" / "index.html") in out


def test_the_summary_of_a_run_without_evaluations_says_not_yet(tmp_path, capsys):
    run_dir = make_run(tmp_path / "run", stop_after=70, evaluated=False)
    write_report(run_dir)
    print_summary(run_dir)
    assert "not yet" in capsys.readouterr().out


def test_filled_tokens_have_the_colour_of_their_forward_and_what_was_given_has_none():
    record = {"pieces": ["a", "b", "", "c", "d"], "decided_at": [0, 0, 1, 3, 3], "is_edited": [0, 0, 0, 1, 0]}
    expected = [Span("ab"), Span("", 0.0), Span("c", 1.0, is_edited=True), Span("d", 1.0)]
    assert Decoded.of(record) == Decoded(expected)
    assert Decoded.of({"filled": "abcd"}) is None  # as earlier versions wrote it
    with_one = {"pieces": ["a"], "decided_at": [1]}
    assert Decoded.of(with_one) == Decoded([Span("a", 0.0)])


def test_scores_of_tasks_that_lie_in_the_run_are_shown_with_their_frontier(tmp_path):
    run_dir = make_run(tmp_path / "run", stop_after=3, evaluated=False)
    write_report(run_dir)
    assert "Not yet. Made by `llada eval" in read_texts(run_dir)[0]
    decoded_at_two_speeds = [
        results("runs/a", "threshold", setting, accuracy=accuracy, speed=speed)
        for setting, accuracy, speed in (("0.9", 0.8, 2.0), ("0.5", 0.77, 4.0))
    ]
    write(RunDir(run_dir).scores, *decoded_at_two_speeds)
    figures = write_report(run_dir).figures
    for text in read_texts(run_dir):
        assert "0.7700 ± 0.0100" in text and "frontier-gsm8k.png" in text and "AUP" in text
    assert [score["value"] for score in figures["tasks"]["scores"]][::2] == [0.8, 0.77]
    (RunDir(run_dir).scores / "other.json").write_text("{}")
    assert write_report(run_dir).figures["tasks"]["scores"] == []
    assert "other.json has no 'results'" in read_texts(run_dir)[0]


def test_the_newest_watched_step_is_told_layer_by_layer(finished):
    text = (finished / "report" / "report.md").read_text()
    assert "the largest logit is 12.5. 2 experts got no row of the global batch." in text
    rows = [line for line in text.splitlines() if line.startswith(("| embedding |", "| layer ", "| head |"))]
    assert [row.split(" | ")[0] for row in rows] == [
        "| embedding", "| layer 1", "| layer 2", "| layer 3", "| layer 4", "| head",
    ]  # fmt: skip
    assert rows[4].endswith("| 2 |") and rows[1].endswith("| - |")
