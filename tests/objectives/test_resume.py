"""Whole runs of SFT, CAP and DPO: stopped and resumed they are equal, and what they learn from is checked."""

import json
import shutil
from pathlib import Path

import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.observe.report import write_report
from llada_megatron.verify import resume
from tests.distributed import run_ranks
from tests.objectives import conversations
from tests.objectives.conversations import BLOCK, OBJECTIVES, L, score, write
from tests.training.runs import (
    arrays_in,
    assert_equal_within_rounding,
    checkpoint,
    comparable,
    records,
    train,
)

STEPS = 4
HALF = f"training.steps={STEPS // 2}"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("conversations")
    chats, pairs = write(folder, "chat"), write(folder, "preference")
    score(conversations.configure(pairs, "dpo"), pairs, weights="those of seed 2")
    return {"sft": chats, "cap": chats, "dpo": pairs}


def configure(corpora: dict[str, str], name: str, run_dir: Path, *overrides: str) -> Config:
    """Four steps with masks of both views, and an evaluation at the end."""
    stage = f"{{name: {name}, block_size: '{BLOCK}', tokens: {8 * STEPS * L}, objective: {OBJECTIVES[name]}}}"
    return conversations.configure(
        corpora[name],
        name,
        f"run.dir={run_dir}",
        f"schedule.stages=[{stage}]",
        f"evaluation.block_sizes=['{BLOCK}']",
        "evaluation.sequences=2",
        "evaluation.draws=1",
        "training.threads=1",
        *overrides,
    )


class Straight(dict[str, Path]):
    """Runs without interruption by the name of their objective, each trained when it is asked for."""

    def __init__(self, corpora: dict[str, str], folder: Path) -> None:
        super().__init__()
        self.corpora, self.folder = corpora, folder

    def __missing__(self, name: str) -> Path:
        train(configure(self.corpora, name, self.folder / name))
        self[name] = self.folder / name
        return self[name]


@pytest.fixture(scope="module")
def straight(corpora, tmp_path_factory) -> Straight:
    return Straight(corpora, tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("name", ["dpo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sft", "cap"))])
def test_a_resumed_run_is_equal_bit_for_bit(corpora, straight, tmp_path, name):
    train(configure(corpora, name, tmp_path, HALF), configure(corpora, name, tmp_path))
    assert len(comparable(tmp_path)) == STEPS and comparable(tmp_path) == comparable(straight[name])
    [resumed], [expected] = (records(run, "evaluations") for run in (tmp_path, straight[name]))
    assert {**resumed, "wall_sec": 0} == {**expected, "wall_sec": 0}
    found, expected = run_ranks(arrays_in, [checkpoint(run, STEPS) for run in (tmp_path, straight[name])])[0]
    assert found and found == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_resumed_in_another_layout_is_equal_within_rounding(corpora, straight, tmp_path, name):
    train(configure(corpora, name, tmp_path, HALF, "layout.cp=2"))
    train(configure(corpora, name, tmp_path, "layout.tp=2", "layout.ep=2"))
    assert_equal_within_rounding(tmp_path, straight[name])


OTHERS = {
    "editing": [],
    "oput": ["diffusion.oput.turns=2"],
    "multi_block": ["diffusion.complementary=false"],
    "levenshtein": ["levenshtein.delete_token_id=300", "levenshtein.split_token_id=301"],
}
"""Objectives on chats, by their own names, with their settings."""


@pytest.mark.full
@pytest.mark.parametrize("name", [*OBJECTIVES, *OTHERS])
def test_a_run_that_is_killed_and_stopped_gets_its_certificate_in_another_layout(corpora, name):
    objective, kind = OBJECTIVES.get(name, name), name if name in OBJECTIVES else "sft"
    stage = f"{{name: {name}, block_size: '{BLOCK}', tokens: {8 * 12 * L}, objective: {objective}}}"
    own = [f"schedule.stages=[{stage}]", "training.threads=1", *OTHERS.get(name, [])]
    overrides = conversations.settings(corpora[kind], kind, *own)
    certificate = resume.check(overrides, ["layout.tp=2"])
    assert certificate.passed and certificate.steps == 12, certificate.as_json()


def test_a_preference_s_evaluation_is_on_record_on_the_terminal_and_in_the_report(straight):
    from llada_megatron.observe.trackers import evaluation_line

    [record] = records(straight["dpo"], "evaluations")
    figures = record["held_out"]
    assert list(figures) == ["margin", "accuracy", "margin_variance", "chosen_bound", "rejected_bound"]
    assert all(figure["se"] >= 0 for figure in figures.values()) and figures["chosen_bound"]["mean"] > 0
    shown = f"{figures['margin']['mean']:.4f} ± {figures['margin']['se']:.4f}"
    assert f"held out: margin {shown}, accuracy" in evaluation_line(record)
    page = write_report(straight["dpo"]).page.with_name("report.md").read_text()
    assert "| margin | accuracy |" in page and f"| {shown} |" in page
    del record["held_out"]  # as of another objective
    assert "held out" not in evaluation_line(record)


def saved(run_dir: Path, step: int) -> dict:
    return json.loads((checkpoint(run_dir, step) / "manifest.json").read_text())["data_fingerprint"]


@pytest.mark.slow
def test_a_run_goes_on_with_the_reference_that_it_began_with(corpora, straight, tmp_path):
    """Other weights in the place of the same reference are refused, before the start writes anything."""
    pairs = str(tmp_path / "pairs")
    for file in Path(corpora["dpo"]).parent.glob("preference.*"):
        if file.is_file():
            shutil.copy(file, f"{pairs}{file.name.removeprefix('preference')}")
    moved = {"dpo": pairs}
    train(configure(moved, "dpo", tmp_path / "run", HALF))
    before = (tmp_path / "run" / "config.yaml").read_text()
    score(conversations.configure(pairs, "dpo"), pairs, seed=3, weights="those of seed 3")
    with pytest.raises(
        BadInput, match="weights was initial weights 3 and is initial weights 2; run `llada score"
    ):
        train(configure(moved, "dpo", tmp_path / "run", "logging.every_steps=2"))
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    score(conversations.configure(pairs, "dpo"), pairs, weights="those of seed 2")
    train(configure(moved, "dpo", tmp_path / "run"))
    assert comparable(tmp_path / "run") == comparable(straight["dpo"])


@pytest.mark.slow
def test_only_a_preference_adds_to_what_a_checkpoint_says_of_its_data(straight):
    assert saved(straight["dpo"], STEPS)["objectives"] == {
        "preference": {"reference": [{"weights": "those of seed 2", "checkpoint": "initial weights 2"}]}
    }
    assert "objectives" not in saved(straight["sft"], STEPS)
    assert "held_out" not in records(straight["sft"], "evaluations")[0]


@pytest.mark.slow
def test_a_checkpoint_that_does_not_know_its_reference_goes_on(corpora, straight, tmp_path):
    """As those do that were saved before references were part of what a resume compares."""
    from llada_megatron.record.manifest import Checkpoint

    run_dir = tmp_path / "run"
    train(configure(corpora, "dpo", run_dir, HALF))
    manifest = Checkpoint.read(checkpoint(run_dir, STEPS // 2)).manifest
    del manifest.data_fingerprint["objectives"]
    manifest.write(checkpoint(run_dir, STEPS // 2))
    train(configure(corpora, "dpo", run_dir))
    assert comparable(run_dir) == comparable(straight["dpo"])
    assert saved(run_dir, STEPS)["objectives"]
