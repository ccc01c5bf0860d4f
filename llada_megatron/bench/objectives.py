"""Seconds per training step by objective: CAP, OPUT, DPO against SFT of the same rows, packed against padded.

All cases train one model in interleaved rounds, on random tokens in conversations of log-normal lengths. Each
reads every sequence under a mask and its complement:

    sft, cap, oput        the same sequences and masks, in one micro-batch per rank; OPUT drafts in a forward
                          pass first, once per turn, and has a loss on all tokens that may be masked
    sft_ones, cap_ones    the same in micro-batches of one sample: CAP counts in a forward pass first
    sft_pairs, dpo        sequences of pairs; DPO's draws are as many samples, so that as many rows pass the
                          layers, and as many the head, as in the two passes over both texts that SFT makes
    sft_padded            one conversation in each sequence, the rest padding that nothing learns
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from llada_megatron.bench import step
from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.flops import DocumentLengths
from llada_megatron.config.layout import micro_batches_per_step
from llada_megatron.config.schedule import Stage
from llada_megatron.config.schema import Config
from llada_megatron.data.packed import PackedSample, PackedSequences
from llada_megatron.data.packing import Packing, best_fit, permutation, quantised

CAP_LIMIT = 1.05
DPO_LIMIT = 1.10
OPUT_LIMIT = 1.40
"""Of one turn."""
CONVERSATIONS = 512
MEAN_OF_LENGTH = 8
"""L is so many times the mean length of a conversation."""
SIGMA = 1.0
PROMPT = 4
"""A prompt is one in so many tokens of a text."""
PAIRED, PADDED = ("sft_pairs", "dpo"), ("sft_padded",)


def lengths_of(config: Config) -> DocumentLengths:
    """Of the conversations: log-normal, with a mean of L / MEAN_OF_LENGTH."""
    mean = config.data.sequence_length / MEAN_OF_LENGTH
    return DocumentLengths(mean / float(np.exp(SIGMA**2 / 2)), SIGMA)


class Conversations:
    """Sequences of conversations of random tokens, in the place of `PackedSequences`.

    texts: of one conversation, 2 for the sides of a preference; `packed`: several to a sequence, as many as
    fit.
    """

    def __init__(self, config: Config, *, texts: int = 1, packed: bool = True) -> None:
        self.config, self.texts = config, texts
        L, lengths = config.data.sequence_length, lengths_of(config)
        random = np.random.default_rng(config.run.seed)
        drawn = random.lognormal(np.log(lengths.median_tokens), lengths.sigma, (CONVERSATIONS, texts))
        longest = L // texts // config.data.pad_to * config.data.pad_to
        self.lengths = drawn.astype(np.int64).clip(PROMPT, longest)
        self.padded = quantised(self.lengths, config.data.pad_to)
        one_each = np.arange(CONVERSATIONS + 1)
        self.packing = (
            best_fit(self.padded.sum(axis=1), L, config.run.seed)
            if packed
            else Packing(one_each[:-1], one_each)
        )
        self.order = permutation(config.run.seed, 0, len(self.packing))

    @property
    def per_sequence(self) -> float:
        """Conversations of a sequence, on average."""
        return CONVERSATIONS / len(self.packing)

    @property
    def padding(self) -> float:
        """Share of the tokens that belong to no conversation."""
        return 1 - int(self.lengths.sum()) / (len(self.packing) * self.config.data.sequence_length)

    def __getitem__(self, index: int) -> PackedSample:
        sequence = int(self.order[index % len(self.packing)])
        L, model = self.config.data.sequence_length, self.config.model
        random = np.random.default_rng([self.config.run.seed, sequence])
        tokens = random.integers(model.vocab_size - 1, size=L)
        supervised = np.zeros(L, dtype=bool)
        ends, documents = [0], []
        for conversation in self.packing[sequence].tolist():
            for text in range(self.texts):
                start = ends[-1]
                ends.append(start + int(self.padded[conversation, text]))
                supervised[start + self.lengths[conversation, text] // PROMPT : ends[-1]] = True
                documents.append(conversation * self.texts + text)
        if ends[-1] < L:
            ends.append(L)
            documents.append(-1)
        return PackedSample(
            tokens=tokens + (tokens >= model.mask_token_id),
            cu_seqlens=np.array(ends, dtype=np.int32),
            document_ids=np.array(documents),
            supervised=supervised,
        )


def data_of(config: Config) -> dict[str, Conversations]:
    """By the name of each stage."""
    packed, pairs, padded = (Conversations(config, **kind) for kind in ({}, {"texts": 2}, {"packed": False}))
    names = [stage.name for stage in rules.schedule_of(config).stages]
    return {name: pairs if name in PAIRED else padded if name in PADDED else packed for name in names}


def run(overrides: list[str], *, rounds: int, json_file: Path | None) -> int:
    """Measure, print, and return 0 when the checks hold, 1 otherwise."""
    config = compose(["experiment=bench_objectives", *overrides])
    rules.check(config)
    cases = step.on_every_rank(_time, config, rounds)
    if cases is None:
        return 0
    report = step.described(config, str(lengths_of(config)))
    return step.finish(report | _report(config, cases), json_file)


def trainers(config: Config) -> dict[str, Any]:
    """A `Trainer` for each stage: one model, and the same samples from the first step of every stage on."""
    from llada_megatron.objectives.preference import Preference
    from llada_megatron.objectives.reference import ReferenceScores
    from llada_megatron.parallel import groups
    from llada_megatron.training.step import assemble

    groups.initialize(config.layout, threads=config.training.threads)
    schedule, data = rules.schedule_of(config), data_of(config)
    one = assemble(config, schedule, lambda step: cast(PackedSequences, None))
    for objective in one.objectives.values():
        if isinstance(objective, Preference):
            zero = np.zeros((2 * CONVERSATIONS, config.preference.draws))
            objective.scores = ReferenceScores({"": zero})
    return {
        stage.name: replace(
            one,
            data=partial(_always, data[stage.name]),
            deal=partial(_from_the_start, schedule.samples_before(stage.first_step)),
        )
        for stage in schedule.stages
    }


def _always(sequences: Conversations, step: int) -> PackedSequences:
    return cast(PackedSequences, sequences)


def _from_the_start(first_of_stage: int, first: int, micro_batch: int, global_batch: int) -> list[list[int]]:
    from llada_megatron.parallel.dealing import sample_indices

    return sample_indices(first - first_of_stage, micro_batch, global_batch)


def _time(config: Config, rounds: int) -> list[step.Case]:
    """Every rank returns the same: a step takes as long as its slowest rank."""
    from llada_megatron.bench.timed import timed_step
    from llada_megatron.parallel import ranks

    of_stage, stages = trainers(config), rules.schedule_of(config).stages
    cases = {stage.name: step.Case(stage.name) for stage in stages}
    for turn in range(rounds + 1):  # the first round warms up
        for stage in stages:
            ranks.barrier()
            taken = timed_step(of_stage[stage.name], stage.first_step + turn, full_logits=False)
            seconds, _ = max(ranks.gathered(taken))
            if turn:
                cases[stage.name].seconds.append(seconds)
    return list(cases.values())


def _report(config: Config, cases: list[step.Case]) -> dict[str, Any]:
    seconds = {case.name: case.seconds for case in cases}
    stages = {stage.name: stage for stage in rules.schedule_of(config).stages}
    data = data_of(config)

    def ratio(name: str, other: str) -> float:
        """Median over the rounds, in each of which both were measured."""
        return statistics.median(a / b for a, b in zip(seconds[name], seconds[other], strict=True))

    def at_most(limit: float, name: str, other: str) -> dict[str, Any]:
        found = ratio(name, other)
        check = {"name": f"{name} / {other}", "ratio": found}
        return check | {"bound": limit, "passed": found <= limit}

    packed, padded = data["sft"], data["sft_padded"]
    figures = [
        {
            "name": "conversations per second, packed over padded",
            "gain": packed.per_sequence / padded.per_sequence * ratio("sft_padded", "sft"),
            "ideal": packed.per_sequence / padded.per_sequence,
            "padding_packed": packed.padding,
            "padding_padded": padded.padding,
        }
    ]
    checks = [at_most(DPO_LIMIT, "dpo", "sft_pairs")]
    if config.diffusion.oput.turns == 1:
        checks.insert(0, at_most(OPUT_LIMIT, "oput", "sft"))
    else:
        figures.insert(0, {"name": "oput / sft, of several turns", "ratio": ratio("oput", "sft")})
    for name, other in (("cap", "sft"), ("cap_ones", "sft_ones")):
        if counts_first(config, stages[name]):
            figures.insert(0, {"name": f"{name} / {other}, which counts first", "ratio": ratio(name, other)})
        else:
            checks.insert(0, at_most(CAP_LIMIT, name, other))
    return {"cases": [case.times() for case in cases], "checks": checks, "figures": figures}


def counts_first(config: Config, stage: Stage) -> bool:
    """Whether a step makes forward passes before its own."""
    return stage.geometry.passes_before(config, micro_batches_per_step(config.layout, stage)) > 0
