"""Stages that read other text, at another length, in other batches, at another rate and other frequencies."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from llada_megatron.config.compose import elsewhere
from llada_megatron.config.errors import BadInput
from llada_megatron.record.manifest import Checkpoint
from tests.distributed import run_ranks
from tests.training.runs import (
    TWO,
    arrays_in,
    assert_equal_within_rounding,
    checkpoint,
    comparable,
    configure,
    copy_corpus,
    records,
    train,
)

YARN = "{type: yarn, factor: 2, original_positions: 64}"
EVALUATED = ["evaluation.block_sizes=['4']", "evaluation.sequences=2", "evaluation.draws=1"]


def stages(other: str) -> str:
    return (
        "schedule.stages=[{name: short, block_size: '4', tokens: 512},"
        f" {{name: mixed, block_size: '4', tokens: 512, path: ['{other}', '${{data.path.0}}'],"
        " weights: [3, 1], global_batch: 2, lr: 2e-3},"
        " {name: long, block_size: '16', tokens: 1024, sequence_length: 128, global_batch: 2, micro_batch: 1,"
        f" rotary_base: 50000, rotary_scaling: {YARN}}},"
        f" {{name: again, block_size: full, tokens: 512, path: ['{other}']}}]"
    )


@pytest.fixture(scope="module")
def changing(corpus, tmp_path_factory) -> tuple[str, Path]:
    """The schedule, and a run of one process without interruption."""
    folder = tmp_path_factory.mktemp("changing")
    other = copy_corpus(corpus, folder)
    tokens = np.memmap(f"{other}.bin", np.uint16, "r+")
    tokens[:] = tokens[::-1].copy()
    schedule = stages(other)
    assert train(configure(corpus, folder / "run", schedule, *EVALUATED)) == [(12, 0, True)]
    return schedule, folder / "run"


def test_every_step_is_of_its_stage(changing):
    found = records(changing[1])
    assert [record["sequence_length"] for record in found] == [64] * 6 + [128] * 4 + [64] * 2
    assert [record["global_batch"] for record in found] == [4] * 2 + [2] * 8 + [4] * 2
    assert [record["consumed_tokens"] for record in found] == [
        *(256, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2304, 2560)
    ]
    rates = [record["lr"] for record in found]
    assert rates[2:6] == [2e-3] * 4 and rates[6] == 1e-3
    evaluations = records(changing[1], "evaluations")
    assert [each["sequence_length"] for each in evaluations] == [64, 64, 128, 64]


def test_a_resume_in_every_stage_equals_the_uninterrupted_run_bit_for_bit(corpus, changing, tmp_path):
    schedule, straight = changing
    attempts = [[f"training.steps={step}"] for step in (1, 3, 7, 10)] + [[]]
    train(*(configure(corpus, tmp_path, schedule, *EVALUATED, *steps) for steps in attempts))
    assert comparable(tmp_path) == comparable(straight)
    evaluations = [records(run, "evaluations") for run in (tmp_path, straight)]
    assert [each["bound"] for each in evaluations[0]] == [each["bound"] for each in evaluations[1]]
    resumed, uninterrupted = run_ranks(arrays_in, [checkpoint(run, 12) for run in (tmp_path, straight)])[0]
    assert resumed == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [["layout.cp=2", "layout.ep=2"], pytest.param(["layout.pp=2"], marks=pytest.mark.full)],
    ids=" ".join,
)
def test_stages_are_the_same_under_another_layout(corpus, changing, tmp_path, layout):
    schedule, straight = changing
    train(configure(corpus, tmp_path, schedule, TWO, *layout))
    assert_equal_within_rounding(tmp_path, straight)


def test_weights_are_used_as_the_stage_has_them_that_trained_them_last(changing):
    saved = {step: Checkpoint.read(checkpoint(changing[1], step)).manifest for step in (6, 10, 12)}
    configs = {step: elsewhere(manifest.config_of_weights, []) for step, manifest in saved.items()}
    assert {step: config.data.sequence_length for step, config in configs.items()} == {6: 64, 10: 128, 12: 64}
    assert configs[10].model.rotary_base == 50000 and configs[10].model.rotary_scaling.factor == 2
    assert configs[12].model == dataclasses.replace(configs[6].model) and len(configs[6].data.path) == 2
    assert saved[12].config == saved[6].config


def test_a_mixture_changes_in_the_middle_of_a_stage_that_ends_there(corpus, changing, tmp_path):
    """What was read stands in the manifest, and the stage that begins goes on behind it."""
    other = str(changing[1].parent / "text")
    one = "schedule.stages=[{name: one, block_size: '4', tokens: %d}%s]"
    train(configure(corpus, tmp_path, one % (2560, ""), "training.steps=3"))
    with pytest.raises(BadInput, match=r"schedule.stages\[0\] \(one\) has been trained and is another"):
        train(
            configure(corpus, tmp_path, one % (512, ""), "optimizer.warmup_tokens=128")
        )  # it has come farther
    more = f", {{name: two, block_size: '4', tokens: 1024, path: ['{corpus}', '{other}'], weights: [1, 1]}}"
    assert train(configure(corpus, tmp_path, one % (768, more))) == [(7, 0, True)]
    manifest = json.loads((checkpoint(tmp_path, 7) / "manifest.json").read_text())
    assert [each["sequences"] for each in manifest["data_read"]] == [[[64, 20]], [[64, 8]]]


def test_another_mixture_behind_the_place_of_a_checkpoint_is_refused(corpus, changing, tmp_path):
    schedule, straight = changing
    for changed, sentence in (
        ("weights: [3, 1]=weights: [1, 3]", r"schedule.stages\[1\] \(mixed\) has been trained"),
        ("global_batch: 2, lr=global_batch: 4, lr", r"schedule.stages\[1\] \(mixed\) has been trained"),
    ):
        before, after = changed.split("=")
        config = configure(corpus, tmp_path, schedule.replace(before, after), *EVALUATED)
        config.run.resume = str(checkpoint(straight, 6))
        with pytest.raises(BadInput, match=sentence):
            train(config)
