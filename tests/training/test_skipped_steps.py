"""Steps whose loss or gradient is not finite: skipped, counted, and too many of them end a run."""

import pytest

from llada_megatron.config.errors import RunFailed
from llada_megatron.verify.layouts import write_corpus
from tests.distributed import run_ranks
from tests.training.runs import configure, records, train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    return write_corpus(tmp_path_factory.mktemp("paragraphs"))


def test_a_run_that_diverges_skips_counts_and_stops_at_its_limit_naming_the_samples(corpus, tmp_path):
    diverging = ["optimizer.lr=1e30", "optimizer.warmup_tokens=0", "training.max_skipped_steps=2"]
    with pytest.raises(RunFailed, match=r"Step 3 \(samples 12 to 15\).*max_skipped_steps=2"):
        train(configure(corpus, tmp_path, *diverging))
    metrics = records(tmp_path)
    assert [record["skipped_steps"] for record in metrics] == [0, 1, 2, 3]
    assert [record["loss"] is None or record["grad_norm"] is None for record in metrics] == [
        False, True, True, True,
    ]  # fmt: skip
    assert len({record["mask_row_norm"] for record in metrics[1:]}) == 1


def train_with_an_infinite_first_sample(config):
    from llada_megatron.training import loop

    def spoil(indices, batch):
        if 0 in indices:
            batch.rows["weights"].fill_(float("inf"))

    loop.run(config, on_batch=spoil)


def test_a_step_with_an_infinite_loss_leaves_no_trace_and_the_run_goes_on(corpus, tmp_path):
    go_on = configure(corpus, tmp_path, "training.steps=3")
    with pytest.raises(RunFailed, match="Every one of the 1 steps was skipped"):
        run_ranks(
            train_with_an_infinite_first_sample,
            configure(corpus, tmp_path, "checkpoint.every_steps=1", "training.steps=1"),
        )
    assert train(go_on) == [(3, 0, True)]
    metrics = records(tmp_path)
    assert [record["skipped_steps"] for record in metrics] == [1, 1, 1]
    assert metrics[0]["loss"] is None or metrics[0]["grad_norm"] is None
    assert all(record["loss"] < 10 for record in metrics[1:])
    assert metrics[1]["mask_row_norm"] == metrics[0]["mask_row_norm"] != metrics[2]["mask_row_norm"]
