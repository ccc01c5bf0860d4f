"""A run whose weights have gone wrong goes back, passes over what spoilt them, and is a run without that."""

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from llada_megatron.config.errors import RunFailed
from llada_megatron.config.schema import Config, TrainingConfig
from llada_megatron.observe.report_life import overview
from llada_megatron.observe.run import Run, figures_of
from llada_megatron.record import events
from llada_megatron.record.manifest import Checkpoint
from llada_megatron.runtime.launch import WorkerDied
from llada_megatron.training.position import Position
from llada_megatron.training.rollback import go_back
from llada_megatron.training.skips import Skips
from tests.distributed import run_ranks
from tests.training.runs import TWO, arrays_in, checkpoint, comparable, configure

TOKENS = 64
"""Of a document and of a sequence, so that a sample is a document."""
POISONED = range(80, 88)
"""Samples of random text: steps 20 and 21 of four samples each."""
GONE_BACK_TO, GOES_ON_AT, STEPS = 18, 22, 25
AR = "schedule.stages=[{name: ar, objective: autoregressive, block_size: '1', tokens: 2560000}]"
WATCH = [
    *("training.max_loss_over_median=1.4", "training.spike_window_steps=4", "training.max_skipped_steps=1"),
    *("checkpoint.every_steps=6", "checkpoint.keep_last=1", "optimizer.lr=1e-2", f"training.steps={STEPS}"),
    *("training.max_rollbacks=1", AR, TWO),
]


def poisoned_corpus(folder: Path) -> str:
    """Documents of one sentence over and over, but for those of the samples POISONED."""
    from llada_megatron.data.packed import build_sequences
    from llada_megatron.data.prepare import prepare_corpus

    sentence = "the clean past is seen by a block of masked tokens "
    texts = [(sentence * 3)[index % len(sentence) :][: TOKENS - 1] for index in range(200)]

    def prepared(name: str) -> str:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_corpus([folder / f"{name}.jsonl"], folder / name, workers=1)
        return str(folder / name)

    config = configure(prepared("clean"), folder / "run")
    data = build_sequences(
        config.data, split="train", seed=config.run.seed, vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id, refuse_ids=True,
    )  # fmt: skip
    draw = random.Random(0)
    for sample in POISONED:
        [document] = data[sample].document_ids.tolist()
        texts[document] = "".join(chr(draw.randrange(33, 127)) for _ in range(TOKENS - 1))
    return prepared("poisoned")


def train(config: Config) -> None:
    from llada_megatron.training import loop

    loop.run(config)


def train_killed_while_it_goes_back(config: Config) -> None:
    from llada_megatron.training import loop, rollback

    rollback.open_stage = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    loop.run(config)


def train_killed_after_it_went_back(config: Config) -> None:
    from llada_megatron.training import loop

    def kill(indices: list[int], batch: object) -> None:
        if max(indices) > 4 * GOES_ON_AT:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.run(config, on_batch=kill)


@pytest.mark.slow
def test_a_run_that_goes_back_ends_as_one_that_never_saw_those_samples(tmp_path):
    [corpus] = run_ranks(poisoned_corpus, tmp_path)
    passed = range(4 * GONE_BACK_TO, 4 * GOES_ON_AT)

    def configured(name: str, *overrides: str) -> Config:
        return configure(corpus, tmp_path / name, *WATCH, *overrides)

    def happened(name: str, event: str) -> list[events.Event]:
        return [each for each in events.read(tmp_path / name) if each["event"] == event]

    run_ranks(train, configured("back"), processes=2)
    run_ranks(train, configured("never", f"training.skip_samples=[{passed[0]}-{passed[-1]}]"), processes=2)
    for worker in (train_killed_while_it_goes_back, train_killed_after_it_went_back):
        with pytest.raises(WorkerDied):
            run_ranks(worker, configured("killed"), processes=2)
    run_ranks(train, configured("killed"), processes=2)

    for name in ("back", "killed"):
        [event] = happened(name, "rolled_back")
        assert (event["step"], event["to"]) == (GOES_ON_AT, GONE_BACK_TO)
        assert event["samples"] == [passed[0], passed[-1]] and "its loss of" in event["why"]
        manifest = Checkpoint.read(checkpoint(tmp_path / name, STEPS)).manifest
        assert manifest.rollbacks == [[GONE_BACK_TO, GOES_ON_AT]]
        assert manifest.skipped_steps == 0 and manifest.skipped_lately == []
        assert comparable(tmp_path / name) == comparable(tmp_path / "never")
    assert [each["step"] for each in happened("back", "spike")] == [20, 21]
    folders = [checkpoint(tmp_path / name, STEPS) for name in ("never", "back", "killed")]
    [[never, *others]] = run_ranks(arrays_in, folders)
    assert all(other == never for other in others)

    run = Run.read(tmp_path / "back")
    figures = figures_of(run)
    assert figures["progress"]["rollbacks"] == [{"step": 22, "to": 18, "samples": [72, 87]}]
    assert "at step 22 to step 18, past samples 72 to 87" in str(overview(run, figures))


def test_a_run_goes_back_as_often_as_it_may_and_says_why_it_cannot(tmp_path):
    def gone_back(most: int, done: list[list[int]]) -> Position:
        config = SimpleNamespace(
            training=TrainingConfig(max_rollbacks=most), run=SimpleNamespace(dir=tmp_path)
        )
        position = Position(skips=Skips(steps=[7, 9]), rollbacks=done)
        return go_back(SimpleNamespace(config=config), position, 10, RunFailed("Too much."))

    with pytest.raises(RunFailed, match=r"^Too much\.$"):
        gone_back(0, [])
    with pytest.raises(RunFailed, match=r"Too much\. The run may not go back once more: .*max_rollbacks=1"):
        gone_back(1, [[2, 6]])
    with pytest.raises(RunFailed, match=r"Too much\. There is no good checkpoint from before step 7"):
        gone_back(2, [[2, 6]])
