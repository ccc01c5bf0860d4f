"""Which weights a run may start from."""

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.rules import schedule_of
from llada_megatron.record.manifest import Checkpoint, Manifest
from llada_megatron.training.position import _check_same_order, batch_change, check_same_model


def test_a_checkpoint_from_before_model_family_is_of_gpt_and_another_family_is_refused() -> None:
    config = compose(["experiment=parity"])
    old = asdict(config.model)
    del old["family"]
    check_same_model(config, Checkpoint(Path("old"), Manifest(config={"model": old})))
    with pytest.raises(BadInput, match=r"model\.family: other -> gpt"):
        other = Manifest(config={"model": old | {"family": "other"}})
        check_same_model(config, Checkpoint(Path("other"), other))


STAGES = "schedule.stages=[{name: a, block_size: '4', tokens: 512}, {name: b, block_size: '8', tokens: 512}]"


def resumed(global_batch: int, manifest: Manifest):
    config = compose(["experiment=parity", STAGES, "data.sequence_length=64"])
    config.layout.global_batch = global_batch
    schedule = schedule_of(config, manifest.batches(global_batch))
    return schedule, batch_change(schedule, manifest)


def test_another_global_batch_is_said_with_the_place_it_goes_on_at_and_the_rounding():
    before = Manifest(config={"layout": {"global_batch": 4}}, step=1)
    assert resumed(4, before)[1] is None
    schedule, (said, figures) = resumed(3, before)
    assert said == (
        "layout.global_batch 4 -> 3 at step 1: goes on with sample 4 in stage a, which ends after step 3"
        " with 640 tokens, in whole steps of 192; the schedule has 6 steps and 1,216 tokens now"
    )
    assert figures["sample"] == 4 and figures["steps"] == 6
    later = Manifest(config={}, step=2, global_batches=[list(part) for part in schedule.batches])
    assert resumed(3, later)[1] is None
    assert "3 -> 8 at step 2: goes on with sample 7 in stage a" in resumed(8, later)[1][0]


def test_a_batch_that_trained_no_step_leaves_no_trace():
    tried = Manifest(config={}, step=2, global_batches=[[0, 4], [2, 3]])
    assert tried.batches(4) == [(0, 4)] and tried.batches(5) == [(0, 4), (2, 5)]


@pytest.mark.parametrize(
    ("corpora", "period", "tokens", "refused"),
    [
        (2, {}, 64 * 2**20, False),  # the first period is the order of earlier versions
        (2, {}, 64 * (2**20 + 8), True),
        (2, {"blend_period": 2**20}, 64 * (2**20 + 8), False),
        (1, {}, 64 * (2**20 + 8), False),
    ],
)
def test_a_blend_of_an_earlier_version_goes_on_in_its_order_or_is_refused(corpora, period, tokens, refused):
    stage = f"schedule.stages=[{{name: a, block_size: '4', tokens: {tokens}}}]"
    config = compose(["experiment=parity", stage, "data.sequence_length=64"])
    fingerprint = {"corpora": [{}] * corpora, **period}
    with pytest.raises(BadInput, match="ordered for all of its") if refused else nullcontext():
        _check_same_order(fingerprint, fingerprint, config, Manifest(config={}, step=4))


def test_a_corpus_of_several_windows_was_in_another_order_in_an_earlier_version():
    config, now = compose(["experiment=parity"]), {"corpora": [{}], "shuffle_window": 2**16}
    _check_same_order(now, now, config, Manifest(config={}, step=4))
    with pytest.raises(BadInput, match="within windows of 65,536"):
        _check_same_order({"corpora": [{}]}, now, config, Manifest(config={}, step=4))
