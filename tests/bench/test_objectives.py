"""The cases of the objectives' benchmark differ in what they say and in nothing else."""

import json

import numpy as np
import pytest

from llada_megatron.bench import objectives
from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.plan import calibrate
from tests.distributed import run_ranks

SMALL = ["model=parity", "data.sequence_length=256"]


def test_conversations_are_whole_and_the_padded_ones_are_the_packed_ones() -> None:
    config = compose(["experiment=bench_objectives", *SMALL])
    data = objectives.data_of(config)
    packed, padded, pairs = data["sft"], data["sft_padded"], data["dpo"]
    assert data["cap"] is packed and data["sft_pairs"] is pairs
    for source in (packed, padded, pairs):
        seen = np.concatenate([source[index].document_ids for index in range(len(source.packing))])
        assert sorted(seen[seen >= 0]) == list(range(objectives.CONVERSATIONS * source.texts))
        sample = source[0]
        assert sample.cu_seqlens[-1] == 256 == len(sample.tokens)
        assert not np.any(np.diff(sample.cu_seqlens) % config.data.pad_to)
        assert (
            config.model.mask_token_id not in sample.tokens and sample.tokens.max() < config.model.vocab_size
        )
    assert np.array_equal(packed.lengths, padded.lengths)
    assert packed.lengths.sum() == pytest.approx((1 - packed.padding) * 256 * len(packed.packing))
    assert (padded.per_sequence, packed.per_sequence > 4) == (1, True)


def rows_of_a_step(config):
    """By stage, in its first step: micro-batches, samples, rows of the head, and what the model reads."""
    from llada_megatron.training.step import micro_batches

    found = {}
    for name, trainer in objectives.trainers(config).items():
        stage = next(stage for stage in trainer.schedule.stages if stage.name == name)
        objective = trainer.objectives[stage.objective]
        batches = list(micro_batches(trainer, objective, stage, stage.first_step, 0.0))
        tokens = [row for batch in batches for row in batch.inputs.tokens.tolist()]
        found[name] = (len(batches), len(tokens), sum(len(batch.inputs.outputs) for batch in batches), tokens)
    return found


def test_steps_that_are_compared_have_equal_rows() -> None:
    found = run_ranks(rows_of_a_step, compose(["experiment=bench_objectives", *SMALL]))[0]
    assert found["cap"] == found["sft"] and found["cap_ones"] == found["sft_ones"]
    assert found["sft_ones"][0] == 2 and found["sft_ones"][1:] == found["sft"][1:]
    assert found["dpo"][:3] == found["sft_pairs"][:3]
    samples, rows, tokens = found["oput"][1:]
    assert (samples, tokens) == (found["sft"][1], found["sft"][3]), "before the model's drafts stand in them"
    assert rows == 2 * found["sft"][2], "every token of the answers, in each of two complementary views"
    L = 256
    clean = {name: [row[L:] for row in tokens] for name, (*_, tokens) in found.items()}
    assert clean["dpo"] == clean["sft_pairs"] and clean["dpo"][0] == clean["dpo"][1]
    layers, padded = found["sft"][1], found["sft_padded"]
    assert padded[1] == layers and padded[2] < found["sft"][2]


@pytest.mark.slow
def test_each_objective_is_timed_and_calibration_reads_what_it_writes(tmp_path) -> None:
    objectives.run(SMALL, rounds=1, json_file=tmp_path / "one.json")
    report = json.loads((tmp_path / "one.json").read_text())
    stages = [stage.name for stage in rules.check(compose(["experiment=bench_objectives"])).stages]
    assert [case["name"] for case in report["cases"]] == stages
    assert {check["name"]: check["bound"] for check in report["checks"]} == {
        "cap / sft": 1.05,
        "oput / sft": 1.40,
        "dpo / sft_pairs": 1.10,
    }
    counted, packing = report["figures"]
    assert counted["ratio"] > 0 and packing["gain"] > 0
    ideal = (1 - packing["padding_packed"]) / (1 - packing["padding_padded"])
    assert packing["ideal"] == pytest.approx(ideal)
    steps = calibrate.read([tmp_path / "one.json"]).steps
    assert [one.stage.name for one in steps] == stages
    assert all(one.planned(one.config.cluster) > 0 for one in steps)


def test_a_step_that_counts_first_is_a_figure_and_no_check() -> None:
    from llada_megatron.bench.step import Case

    config = compose(["experiment=bench_objectives", *SMALL, "layout.global_batch=4"])
    names = [stage.name for stage in rules.check(config).stages]
    cases = [Case(name, seconds=[2.0 if name == "dpo" else 1.0]) for name in names]
    report = objectives._report(config, cases)
    assert [(check["name"], check["passed"]) for check in report["checks"]] == [
        ("oput / sft", True),
        ("dpo / sft_pairs", False),
    ]
    assert [figure["name"] for figure in report["figures"]][:2] == [
        "cap_ones / sft_ones, which counts first",
        "cap / sft, which counts first",
    ]


def test_drafts_of_several_turns_are_a_figure_and_no_check() -> None:
    from llada_megatron.bench.step import Case

    config = compose(["experiment=bench_objectives", *SMALL, "diffusion.oput.turns=2"])
    names = [stage.name for stage in rules.check(config).stages]
    cases = [Case(name, seconds=[2.0 if name == "oput" else 1.0]) for name in names]
    report = objectives._report(config, cases)
    assert "oput / sft" not in [check["name"] for check in report["checks"]]
    assert {"name": "oput / sft, of several turns", "ratio": 2.0} in report["figures"]
