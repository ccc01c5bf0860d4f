"""Finite spikes of loss and gradient are skipped, and ranges of samples passed over, alike on every rank."""

import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput, RunFailed
from llada_megatron.config.schema import TrainingConfig
from llada_megatron.record import events
from llada_megatron.training.skips import Skips
from llada_megatron.training.spikes import Spikes
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks
from tests.training.runs import LONG, TWO, arrays_in, checkpoint, configure, records


def test_a_spike_is_what_stands_out_of_the_median_of_a_full_window():
    settings = TrainingConfig(max_loss_over_median=2, spike_window_steps=3)
    spikes = Spikes()
    for loss in (9.0, 1.0, 1.0):
        assert not spikes.found(settings, 100.0, 1.0), "too little is known"
        spikes.learnt(settings, loss, 1.0)
    assert not spikes.found(settings, 2.0, 1e9), "norms are not looked at"
    assert spikes.found(settings, 2.5, 1.0) == "its loss of 2.5 is 2.5 times the median of 1"
    for _ in range(2):
        spikes.learnt(settings, 4.0, 1.0)
    assert spikes.losses == [1.0, 4.0, 4.0] and not spikes.found(settings, 8.0, 1.0)
    norms = TrainingConfig(max_grad_norm_over_median=3, spike_window_steps=3)
    assert "gradient norm of 4 is 4.0 times" in spikes.found(norms, 1e9, 4.0)
    spikes.clear()
    spikes.learnt(TrainingConfig(), 1.0, 1.0)
    assert spikes == Spikes() and not spikes.found(norms, 1.0, 9.0)


def test_too_many_spikes_end_a_run_and_say_how_to_pass_over_them():
    skips, settings = Skips(), TrainingConfig(max_skipped_steps=0)
    with pytest.raises(RunFailed, match=r"its loss of 9 .*which training.skip_samples passes over"):
        skips.add_step(settings, 7, range(28, 32), "its loss of 9 is 9.0 times the median of 1")


@pytest.mark.parametrize("spans", ["[9-3]", "[1-2-3]", "[-4]", "[a]"])
def test_a_span_that_is_none_is_refused(spans):
    with pytest.raises(BadInput, match=r"training.skip_samples.*for example 4000-4095"):
        compose(["experiment=parity", f"training.skip_samples={spans}"])


def train_spoilt(*configs):
    """With weights of the samples of steps 3 and 4 that make finite gradients a thousandfold."""
    from llada_megatron.training import loop

    def spoil(indices, batch):
        if set(indices) & set(range(12, 20)):
            batch.rows["weights"].mul_(1000)

    for config in configs:
        loop.run(config, on_batch=spoil)


def train_clean(config):
    from llada_megatron.training import loop

    loop.run(config)


def test_a_spike_that_is_skipped_leaves_what_passing_over_its_samples_leaves(tmp_path):
    corpus = write_corpus(tmp_path)
    watch = ["training.max_grad_norm_over_median=50", "training.spike_window_steps=2", LONG, TWO]

    def configured(name, *overrides):
        return configure(corpus, tmp_path / name, *watch, "training.steps=6", *overrides)

    begun = configured("resumed", "training.steps=3")
    run_ranks(train_spoilt, configured("straight"), begun, processes=2)
    run_ranks(train_spoilt, configured("resumed"), processes=2)
    run_ranks(train_clean, configured("passed", "training.skip_samples=[12,15-16]"), processes=2)
    for name in ("straight", "resumed"):
        found = [event for event in events.read(tmp_path / name) if event["event"] == "spike"]
        assert [(event["step"], event["samples"]) for event in found] == [(3, [12, 15]), (4, [16, 19])]
        assert "gradient norm" in found[0]["why"]
        assert [record["skipped_steps"] for record in records(tmp_path / name)] == [0, 0, 0, 1, 2, 2]
    passed = [
        event["samples"] for event in events.read(tmp_path / "passed") if event["event"] == "passed_over"
    ]
    assert passed == [[12, 15], [16, 19]]
    assert [record["step"] for record in records(tmp_path / "passed")] == [0, 1, 2, 5]
    folders = [checkpoint(tmp_path / name, 6) for name in ("straight", "resumed", "passed")]
    [[straight, *others]] = run_ranks(arrays_in, folders)
    assert all(other == straight for other in others)
