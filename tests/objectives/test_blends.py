"""Chats and plain documents in one run: each learnt as what it is; pairs blend with nothing else."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llada_megatron.config import rules
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import build_sequences
from llada_megatron.data.prepare import prepare_corpus
from llada_megatron.objectives.reference import ReferenceScores
from llada_megatron.objectives.registry import objective_of
from tests.distributed import run_ranks
from tests.objectives import conversations
from tests.objectives.conversations import BLOCK, L, score, write
from tests.training.runs import arrays_in, checkpoint, comparable, records, train

SHARES = (3, 1)
STEPS = 4


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("blend")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"A plain document, number {n}. " * 3}) + "\n" for n in range(60))
    )
    prepare_corpus([folder / "text.jsonl"], folder / "text", workers=1)
    return {format: write(folder, format) for format in ("chat", "preference")} | {"text": f"{folder}/text"}


def configure(corpora: dict[str, str], *overrides: str) -> Config:
    stage = f"{{name: sft, block_size: '{BLOCK}', tokens: {8 * STEPS * L}}}"
    return conversations.configure(
        f"{corpora['chat']},{corpora['text']}",
        "sft",
        f"data.weights=[{SHARES[0]},{SHARES[1]}]",
        f"schedule.stages=[{stage}]",
        "training.threads=1",
        *overrides,
    )


def test_a_blend_holds_its_shares_and_every_token_of_a_document_is_learnt(corpora):
    config = configure(corpora)
    schedule = rules.check(config)
    data = build_sequences(
        config.data,
        split="train",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
    )
    samples = [data[index] for index in range(64)]
    assert Counter(sample.corpus for sample in samples) == {corpora["chat"]: 48, corpora["text"]: 16}
    objective, stage = objective_of("diffusion", config, schedule), schedule.stages[0]
    for sample in samples[:8]:
        batch = objective.batch({0: sample}, [0, 1], stage)  # a pair of views
        asked = np.bincount(batch.inputs.outputs.numpy() // 2, minlength=L)
        taught = np.ones(L, bool) if sample.corpus == corpora["text"] else sample.supervised
        assert (asked == taught).all() and batch.counts == (2 * taught.sum(),)


@pytest.mark.slow
def test_a_blend_trains_and_resumes_bit_for_bit(corpora, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(configure(corpora, f"run.dir={straight}"))
    train(
        configure(corpora, f"run.dir={resumed}", f"training.steps={STEPS // 2}"),
        configure(corpora, f"run.dir={resumed}"),
    )
    assert all(math.isfinite(record["loss"]) for record in records(straight))
    assert len(comparable(straight)) == STEPS and comparable(resumed) == comparable(straight)
    found, expected = run_ranks(arrays_in, [checkpoint(run, STEPS) for run in (resumed, straight)])[0]
    assert found and found == expected


@pytest.mark.parametrize("other", ["text", pytest.param("chat", marks=pytest.mark.slow)])
def test_a_preference_learns_from_pairs_alone(corpora, tmp_path, other):
    pairs = corpora["preference"]
    config = conversations.configure(f"{pairs},{corpora[other]}", "dpo", f"run.dir={tmp_path / 'run'}")
    if not Path(f"{pairs}.scores.safetensors").exists():
        score(conversations.configure(pairs, "dpo"), pairs)
    with pytest.raises(BadInput, match=f"{corpora[other]} holds no pairs"):
        ReferenceScores.load(config, BLOCK)
    with pytest.raises(BadInput, match="or take it out of"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
