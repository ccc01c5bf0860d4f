"""The report of synthetic runs: complete, running, and without experts or evaluations."""

import argparse
import json
import math
import random
from html.parser import HTMLParser

import numpy as np
import pytest

from llada_megatron.commands.report import add_arguments, print_summary, run
from llada_megatron.config.errors import BadInput
from llada_megatron.observe.plots import _running_mean, _spread
from llada_megatron.observe.report import (
    Heading,
    Paragraph,
    Table,
    Verbatim,
    to_html,
    to_markdown,
    write_report,
)

LENGTH = 256
SCHEDULE = [
    ("pretrain", "1", "autoregressive", 60),
    ("warmup-1", "1", "diffusion", 8),
    ("warmup-4", "4", "diffusion", 8),
    ("warmup-32", "32", "diffusion", 8),
    ("warmup-64", "64", "diffusion", 8),
    ("stable", "full", "diffusion", 80),
    ("decay-128", "128", "diffusion", 10),
    ("decay-64", "64", "diffusion", 10),
    ("decay-32", "32", "diffusion", 20),
]
STEP_TOKENS = 8 * LENGTH


def block_size_of(text: str) -> int:
    return LENGTH if text == "full" else int(text)


def make_run(run_dir, schedule=SCHEDULE, stop_after=None, evaluated=True, experts=8):
    """A run's directory whose numbers look like a conversion's; `stop_after` steps it is still going."""
    run_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    write_config(run_dir, schedule, experts)
    steps, evaluations = [], []
    if evaluated:
        evaluations.append(evaluation("init", "diffusion", 1, -1, 0, 0, 5.2, rng))
    for index, (name, size, objective, count) in enumerate(schedule):
        for position in range(count):
            step = len(steps)
            floor = 1.6 if objective == "autoregressive" else 1.9 + 0.1 * math.log(block_size_of(size), 4)
            start = 5.5 if index == 0 else floor + 0.8
            loss = floor + (start - floor) * math.exp(-position / 12) + rng.gauss(0, 0.1)
            steps.append(step_record(step, name, objective, block_size_of(size), loss, experts, rng))
        if evaluated and (stop_after is None or len(steps) <= stop_after):
            evaluations.append(
                evaluation(name, objective, block_size_of(size), len(steps) - 1, len(steps), count, 2.0, rng)
            )
    steps = steps[:stop_after]
    write_lines(run_dir / "metrics.jsonl", steps)
    write_lines(run_dir / "evaluations.jsonl", evaluations)
    if evaluated:
        sample = {
            "stage": schedule[-1][0],
            "block_size": 32,
            "masked": "a ░░ <b> ``` c\nd",
            "filled": "a 12",
            "original": "a|34",
        }
        write_lines(run_dir / "samples.jsonl", [sample] * 3)
    return run_dir


def write_config(run_dir, schedule, experts):
    stages = "".join(
        f"  - {{name: {name}, block_size: '{size}', tokens: {count * STEP_TOKENS}, objective: {objective}}}\n"
        for name, size, objective, count in schedule
    )
    (run_dir / "config.yaml").write_text(
        f"run: {{name: synthetic_run, dir: 'runs/${{run.name}}'}}\n"
        f"model: {{vocab_size: 512, layers: 4, hidden_size: 64, experts: {experts}, experts_per_token: 2}}\n"
        f"data: {{sequence_length: {LENGTH}}}\nschedule:\n  stages:\n{stages}"
    )


def step_record(step, stage, objective, block_size, loss, experts, rng):
    diffusion = objective == "diffusion"
    by_t = [loss * (0.4 + 0.12 * bin) + rng.gauss(0, 0.05) for bin in range(10)]
    by_t[rng.randrange(10)] = None  # a bin that no sample of the step fell into
    return {
        "step": step,
        "consumed_samples": 8 * (step + 1),
        "consumed_tokens": STEP_TOKENS * (step + 1),
        "stage": stage,
        "objective": objective,
        "block_size": block_size,
        "loss": None if step == 20 else loss,
        "grad_norm": 1.0,
        "lr": 1e-3 * min(1, (step + 1) / 20),
        "tokens_per_sec": 1000 + step,
        "mfu": None,
        "load_max_over_mean": 1.1 + math.exp(-step / 30) + rng.gauss(0, 0.03) if experts else None,
        "loss_by_t": by_t if diffusion else None,
        "loss_by_block_position": [loss] * min(block_size, 4),
        "skipped_steps": int(step >= 20),
        "mask_row_norm": 1.0,
        "embedding_noise_sigma": 0.0,
    }


def evaluation(stage, objective, block_size, step, steps_done, stage_steps, level, rng):
    bound = {}
    if objective == "diffusion":
        for size in (1, 4, 32, LENGTH):
            mean = level + 0.08 * math.log2(size) + 0.4 * math.exp(-steps_done / 80) + rng.gauss(0, 0.02)
            bound[str(size)] = {"mean": mean, "se": 0.012, "bits_per_byte": mean / 3 / math.log(2)}
    return {
        "step": step,
        "consumed_tokens": STEP_TOKENS * steps_done,
        "stage": stage,
        "objective": objective,
        "block_size": block_size,
        "stage_tokens": STEP_TOKENS * stage_steps,
        "train_loss": level if stage_steps else None,
        "bound": bound,
        "ar": {"nll": 1.7, "se": 0.01, "bits_per_byte": 0.82, "tokens": 60 * STEP_TOKENS}
        if stage == "pretrain"
        else None,
        "block1_views": {"unshifted": 5.3, "shifted": 1.8, "ar_from_clean_half": 1.7}
        if stage == "init"
        else None,
        "baselines": {"unigram": 4.2, "bigram": 2.9},
        "vocab_size": 512,
        "wall_sec": 2.0 * steps_done,
    }


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_texts(run_dir):
    return [(run_dir / "report" / name).read_text() for name in ("report.md", "index.html")]


def pixels(path):
    from matplotlib.image import imread

    return imread(path)[..., :3]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = make_run(tmp_path_factory.mktemp("runs") / "synthetic_run")
    assert write_report(run_dir) == run_dir / "report" / "index.html"
    return run_dir


def test_the_report_names_every_stage_in_both_formats(finished):
    for text in read_texts(finished):
        assert all(name in text for name in ["init", *(stage[0] for stage in SCHEDULE)])
        assert "The schedule is complete" in text


@pytest.mark.parametrize("name", ["loss.png", "bound.png", "loss_by_t.png", "expert_load.png"])
def test_the_report_shows_a_picture_that_is_not_blank(finished, name):
    image = pixels(finished / "report" / name)
    assert image.shape[1] == 1080 and image.std() > 0.02
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 50
    assert all(name in text for text in read_texts(finished))


def test_report_json_has_the_documented_keys_and_numbers(finished):
    report = json.loads((finished / "report.json").read_text())
    assert set(report) == {"schema", "stages", "ar", "baselines", "vocab_size", "wall_sec", "versions"}
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
    assert not (run_dir / "report" / "bound.png").exists() and "bound.png" not in page
    report = json.loads((run_dir / "report.json").read_text())
    assert (report["ar"], report["baselines"], report["wall_sec"]) == (None, None, None)
    assert [stage["tokens"] // STEP_TOKENS for stage in report["stages"]] == [60, 8, 2, 0, 0, 0, 0, 0, 0]
    assert all(stage["bound"] == {} and stage["train_loss"] is None for stage in report["stages"])


def test_a_run_of_one_step_of_an_autoregressive_model_without_experts_gives_a_report(tmp_path):
    run_dir = make_run(tmp_path / "run", schedule=SCHEDULE[:1], stop_after=1, evaluated=False, experts=0)
    write_report(run_dir)
    assert "the model has no experts" in read_texts(run_dir)[0]
    assert sorted(file.name for file in (run_dir / "report").glob("*.png")) == ["loss.png"]


def test_a_directory_that_is_no_run_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.yaml; give a run\.dir"):
        write_report(tmp_path / "missing")
    make_run(tmp_path / "new", stop_after=0, evaluated=False)
    with pytest.raises(BadInput, match=r"no metrics\.jsonl with a step in it"):
        write_report(tmp_path / "new")


def test_the_page_is_balanced_and_loads_nothing_but_the_pictures_beside_it(finished):
    class Checker(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.sources = [], []

        def handle_starttag(self, tag, attributes):
            self.sources += [value for key, value in attributes if key in ("src", "href")]
            if tag not in ("meta", "img"):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    checker = Checker()
    checker.feed(read_texts(finished)[1])
    assert checker.open == []
    assert len(checker.sources) == 4 and all(
        (finished / "report" / source).is_file() for source in checker.sources
    )


def test_text_of_a_run_cannot_break_either_format():
    parts = [Heading("<t>", 1), Paragraph("a & b"), Table(["x|y"], [["<i>"]]), Verbatim("```\n</pre>")]
    page, markdown = to_html(parts), to_markdown(parts)
    assert "<title>&lt;t&gt;</title>" in page and "a &amp; b" in page and "<td>&lt;i&gt;</td>" in page
    assert "<pre>```\n&lt;/pre&gt;</pre>" in page
    assert "| x\\|y |" in markdown and "````text\n```\n</pre>\n````" in markdown


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
