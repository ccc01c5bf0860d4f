"""SFT, CAP and DPO: what is supervised, packed as one by one, and the same in every layout."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from llada_megatron.config import rules
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample, build_sequences
from llada_megatron.objectives.corruption import Corruption
from llada_megatron.objectives.preference import Preference
from llada_megatron.objectives.reference import scores_file
from tests.distributed import run_ranks
from tests.objectives.conversations import BLOCK, OBJECTIVES, L, configure, score, write

LAYOUTS = {
    "pp2": ["layout.pp=2"],
    "cp2": ["layout.cp=2"],
    "dp2": ["layout.processes=2"],
    "tp2": ["layout.tp=2"],
    "ep2": ["layout.ep=2"],
    "recompute": ["layout.processes=2", "layout.recompute=full"],
    "tp2 cp2 ep4": ["layout.tp=2", "layout.cp=2", "layout.ep=4"],
}
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("dp2", "tp2", "ep2", "recompute")]
MORE.append(pytest.param("tp2 cp2 ep4", marks=pytest.mark.full))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("conversations")
    chats, pairs = write(folder, "chat"), write(folder, "preference")
    score(configure(pairs, "dpo"), pairs)
    return {"sft": chats, "cap": chats, "dpo": pairs}


def trained(config: Config) -> dict[str, Any]:
    """Losses, norms and figures of every step."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    groups.initialize(config.layout)
    schedule = rules.check(config)
    trainer = build_trainer(config, schedule)
    steps = [train_step(trainer, step) for step in range(schedule.total_steps)]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "figures": [step.figures for step in steps],
    }


@pytest.fixture(scope="module")
def straight(corpora) -> dict[str, dict[str, Any]]:
    return {name: run_ranks(trained, configure(corpora[name], name))[0] for name in OBJECTIVES}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("layout", ["pp2", "cp2", *MORE])
def test_every_layout_trains_the_same(corpora, straight, name, layout):
    config = configure(corpora[name], name, *LAYOUTS[layout])
    for found in run_ranks(trained, config, processes=config.layout.processes):
        assert found["loss"] == pytest.approx(straight[name]["loss"], rel=2e-6)
        assert found["grad_norm"] == pytest.approx(straight[name]["grad_norm"], rel=1e-5)
        for ours, expected in zip(found["figures"], straight[name]["figures"], strict=True):
            if name == "dpo":
                assert ours == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_step_learns_to_prefer_the_chosen_text(corpora):
    options = ["optimizer.lr=1e-2", "preference.sft_weight=0"]
    [found] = run_ranks(trained, configure(corpora["dpo"], "dpo", *options))
    assert found["figures"][1]["margin"] > found["figures"][0]["margin"]


def sequences(config: Config):
    return build_sequences(
        config.data,
        split="train",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
    )


def pieces(sample: PackedSample) -> list[tuple[int, int]]:
    return [*pairwise(sample.cu_seqlens.tolist())]


def test_answers_and_their_padding_are_supervised_and_nothing_else_is(corpora):
    data = sequences(configure(corpora["sft"], "sft"))
    for index in range(data.sequences_per_epoch):
        sample = data[index]
        for (first, last), document in zip(pieces(sample), sample.document_ids, strict=True):
            if document < 0:
                assert not sample.supervised[first:last].any()  # the rest of the sequence
                continue
            assert (last - first) % BLOCK == 0
            shown = bytes(min(token, 255) for token in sample.tokens[first:last]).decode("latin1")
            taught = zip(shown, sample.supervised[first:last], strict=True)
            expected = re.sub(r"user: [^\n]*\nassistant: ", lambda prompt: "_" * len(prompt[0]), shown)
            assert "".join(c if is_taught else "_" for c, is_taught in taught) == expected


def one_by_one(sample: PackedSample) -> list[PackedSample]:
    """Each conversation of a sequence as a sequence of its own, without padding."""
    return [
        PackedSample(sample.tokens[a:b], np.array([0, b - a], np.int32), supervised=sample.supervised[a:b])
        for a, b in pieces(sample)
        if sample.supervised[a:b].any()
    ]


def packed_and_apart(config: Config) -> dict[str, Any]:
    """Loss and gradients of a packed sequence and of its conversations; what changing one does to others."""
    from llada_megatron.model.provider import build_stage
    from llada_megatron.objectives.registry import objective_of
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    schedule = rules.schedule_of(config)
    stage, objective = schedule.stages[0], objective_of(schedule.stages[0].objective, config, schedule)
    model = build_stage(config)
    sample = sequences(config)[0]
    masked = np.random.default_rng(0).random(L) < 0.5
    rate = np.full(L, 0.5)

    def run(
        samples: list[PackedSample], masks: list[np.ndarray]
    ) -> tuple[float, list[torch.Tensor], torch.Tensor]:
        model.zero_grad(set_to_none=True)
        total, count, found = 0.0, 0, []
        for each, mask in zip(samples, masks, strict=True):
            made = iter([Corruption(mask & each.supervised, rate[: len(mask)])])
            objective.corrupt = lambda *unused, made=made: next(made)
            batch = objective.batch({0: each}, [0], stage)
            batch.inputs.readout = objective.readout
            output = model(batch.inputs)
            loss = objective.loss(batch, output)
            loss.sums[0].backward()
            total, count = total + float(loss.sums[0].detach()), count + batch.counts[0]
            found.append(output.detach().reshape(len(batch.inputs.outputs), -1)[:, 0])
        gradients = [p.grad / count for p in model.parameters() if p.grad is not None]
        return total / count, gradients, torch.cat(found)

    apart = one_by_one(sample)
    starts = [a for a, b in pieces(sample) if sample.supervised[a:b].any()]
    parts = [masked[a : a + len(each.tokens)] for a, each in zip(starts, apart, strict=True)]
    packed, single = run([sample], [masked]), run(apart, parts)
    changed = sample.tokens.copy()
    changed[: sample.cu_seqlens[1]] = 65  # the whole first conversation
    other = run([PackedSample(changed, sample.cu_seqlens, supervised=sample.supervised)], [masked])
    mine = (masked & sample.supervised)[: sample.cu_seqlens[1]].sum()
    return {
        "conversations": len(apart),
        "loss": (packed[0], single[0]),
        "gradients": max(
            float((a - b).norm() / max(b.norm(), 1e-12)) for a, b in zip(packed[1], single[1], strict=True)
        ),
        "others changed": float((other[2][mine:] - packed[2][mine:]).abs().max()),
        "own changed": float((other[2][:mine] - packed[2][:mine]).abs().max()),
    }


def test_packed_conversations_are_learnt_as_if_each_were_alone(corpora):
    [found] = run_ranks(packed_and_apart, configure(corpora["sft"], "sft", "layout.micro_batch=1"))
    assert found["conversations"] > 1
    assert found["loss"][0] == pytest.approx(found["loss"][1], rel=1e-6)
    assert found["gradients"] < 1e-5
    assert found["own changed"] > 1e-3 and found["others changed"] == 0


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("run.seed=2", "run.seed was 1 and is 2"),
        ("preference.draws=1", "preference.draws was 2 and is 1"),
        ("diffusion.gives_mask_token=false", "diffusion.gives_mask_token was True and is False"),
    ],
)
def test_scores_of_other_masks_are_refused(corpora, override, sentence):
    with pytest.raises(BadInput, match=sentence):
        run_ranks(trained, configure(corpora["dpo"], "dpo", override))


def test_a_corpus_without_scores_is_refused(corpora, tmp_path):
    pairs = write(tmp_path, "preference")
    assert not scores_file(pairs).exists()
    with pytest.raises(BadInput, match="run `llada score"):
        run_ranks(trained, configure(pairs, "dpo"))


def test_a_sequence_that_is_left_out_counts_no_pair(corpora):
    config = configure(corpora["dpo"], "dpo")
    objective = Preference("preference", config, rules.schedule_of(config))
    good = sequences(config)[0]
    for sample, pairs in ((good, len(good.document_ids) // 2), (replace(good, is_left_out=True), 0)):
        batch, texts = objective.scored({0: sample}, [0, 1], BLOCK)
        assert (batch.counts[0], len(texts)) == (pairs, 2 * pairs)
        assert (len(batch.inputs.outputs) > 0) == (pairs > 0)


def test_a_pairs_digest_does_not_depend_on_its_neighbours(corpora):
    config = configure(corpora["dpo"], "dpo")
    objective, data = Preference("preference", config, rules.schedule_of(config)), sequences(config)
    alone, together = (objective.scored(data, indices, BLOCK)[0] for indices in ([2, 3], [0, 1, 2, 3]))
    assert [alone.digest(0), alone.digest(1)] == [together.digest(2), together.digest(3)]
