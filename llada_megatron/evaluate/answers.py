"""A model's answers to what tasks ask, on every rank of a layout; rank 0 writes each when it is there.

Likelihoods come first, then texts under each decoding rule. What is written already is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llada_megatron.checkpoint.load import load_model
from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json
from llada_megatron.config.schema import Config
from llada_megatron.data.tokenizer import load_tokenizer
from llada_megatron.evaluate.continuation import Likelihood, Scorer, of_windows, windows
from llada_megatron.generate import Decoder, Limits, Prompt, Result
from llada_megatron.generate.full import full_attention_of, kind_of
from llada_megatron.generate.methods import Method, method_of, settings_of
from llada_megatron.generate.partial import PartialFile
from llada_megatron.generate.rules import rule_of
from llada_megatron.harness.requests import GENERATE, GREEDY, Generation, Key, Request, Score, key_of
from llada_megatron.objectives.passes import evaluating
from llada_megatron.parallel import groups, ranks
from llada_megatron.runtime import device

ONE_BY_ONE = rule_of("quota", {"threshold": 1.0})
"""Greedy decoding: each forward fills the most probable token."""
Answer = dict[str, Any]


@dataclass(frozen=True)
class Decoding:
    """A rule with its settings."""

    name: str
    rule: str
    settings: Mapping[str, str]


@dataclass(frozen=True)
class EvaluationJob:
    """What is asked of which model, and how it answers."""

    checkpoint: Path
    block_size: int
    """0: an autoregressive model."""
    generations: Sequence[Generation]
    scores: Sequence[Score]
    rules: Sequence[str] = ("threshold",)
    filled_block: int = 0
    """Positions of a text that are filled before the next ones; 0: a block."""
    full: Mapping[str, str] | None = None
    """Settings of `full_attention_of` for texts; None: blocks see no later one."""
    settings: Mapping[str, Sequence[str]] | None = None
    """Values to try of each; a rule takes those that it has."""
    tokenizer: str | None = None
    end_tokens: Sequence[int] = ()
    max_forwards: int = 0
    draws: int = 32
    """Masks of a continuation."""
    seed: int = 0
    batch: int = 8
    max_cached_tokens: int = 0
    cuda_graphs: bool = False
    partial: Path | None = None
    """JSON lines of the answers so far; without it they are only returned."""
    origin: str = ""
    """What a temporary checkpoint was made from."""

    @property
    def identity(self) -> str:
        """What decides an answer, besides its decoding: not how it is computed, nor other rules."""
        said = asdict(replace(self, rules=(), settings=None))
        for how in ("batch", "max_cached_tokens", "cuda_graphs", "partial"):
            del said[how]
        text = json.dumps(said, sort_keys=True, default=str)
        if self.origin:  # the next command has it elsewhere
            text = text.replace(str(self.checkpoint), "")
        return hashlib.sha256(text.encode()).hexdigest()


def decodings_of(rules: Sequence[str], settings: Mapping[str, Sequence[str]]) -> list[Decoding]:
    """For each rule every combination of those settings that it has; BadInput for one that none has."""
    known = {rule: settings_of(rule) for rule in rules}
    for key in settings:
        if not any(key in known[rule] for rule in rules):
            names = " or ".join(rules)
            raise BadInput(f"{key} is no setting of {names}: remove it, or add a rule that has it.")
    found = []
    for rule in known:
        own = {key: dict.fromkeys(values) for key, values in settings.items() if key in known[rule]}
        for values in product(*own.values()):
            chosen = dict(zip(own, values, strict=True))
            method_of(rule, chosen)
            name = ",".join([rule, *(f"{key}={value}" for key, value in chosen.items())])
            found.append(Decoding(name, rule, chosen))
    return found


def answer(config: Config, job: EvaluationJob) -> tuple[list[Answer], list[Decoding]]:
    """The answers to all requests, on rank 0, and the decodings; for every rank of config.layout.

    An answer has `kind`, `decoding`, `task`, `number`, `digest` and `spent_sec`, the time since the one
    before; a likelihood `nats` and `se`; `greedy` `is_greedy`; a text `text`, `tokens` with the forward that
    each was `decided_at`, places of those that were `edited`, `stop`, `forwards` by kind and
    `spent_forwards`. Raises BadInput before the first forward for whatever cannot be answered.
    """
    device.seed_everything(job.seed, config.precision.deterministic)
    groups.initialize(config.layout, threads=config.training.threads)
    try:
        decodings = decodings_of(job.rules, job.settings or {})
        full_attention_of(job.full or {})  # or what is wrong with it, before the weights
        decodings = decodings if job.generations else []
        keys = list(asked(job, decodings))
        desk = Desk(job, ranks.from_first_rank(_written, job), len(keys))
        if waiting := [each for each in keys if each not in desk.answers]:
            (model,) = load_model(config, job.checkpoint)
            with evaluating([model]):
                Answering(config, job, model, desk, set(waiting)).run(decodings)
        return (list(desk.answers.values()) if ranks.rank() == 0 else []), decodings
    finally:
        groups.destroy()


def asked(job: EvaluationJob, decodings: Sequence[Decoding]) -> Iterator[Key]:
    """The keys of all answers of a job."""
    for score in job.scores:
        yield score.kind, "", score.task, score.number
        if score.wants_greedy and job.block_size:
            yield GREEDY, "", score.task, score.number
    for decoding in decodings:
        for each in job.generations:
            yield GENERATE, decoding.name, each.task, each.number


def _written(job: EvaluationJob) -> list[Answer]:
    if job.partial is None:
        return []
    return [parse_json(line) for line in PartialFile(job.partial, job.identity, "--json").lines]


class Desk:
    """Answers as they come; rank 0 has a file of them where one was asked for."""

    def __init__(self, job: EvaluationJob, written: Iterable[Answer], wanted: int) -> None:
        self.answers: dict[Key, Answer] = {key_of(each): each for each in written}
        self._wanted = wanted
        self._file: PartialFile | None = None
        if job.partial is not None and ranks.rank() == 0:
            self._file = PartialFile(job.partial, job.identity, "--json")
        self._began = device.seconds()

    def starts(self) -> None:
        """What follows takes its time from here."""
        self._began = device.seconds()

    def add(self, request: Request, kind: str, decoding: str = "", **said: Any) -> None:
        """One request is answered."""
        now = device.seconds()
        about = {"kind": kind, "decoding": decoding, "task": request.task, "number": request.number}
        made = {**about, "digest": request.digest, **said, "spent_sec": round(now - self._began, 6)}
        self._began = now
        self.answers[key_of(made)] = made
        done = len(self.answers)
        if ranks.rank() == 0 and 10 * done // self._wanted > 10 * (done - 1) // self._wanted:
            print(f"{done} of {self._wanted} answers", file=sys.stderr, flush=True)
        if self._file is not None:
            self._file.append(json.dumps(made, ensure_ascii=False))


class Answering:
    """One model that answers what is waiting."""

    def __init__(
        self, config: Config, job: EvaluationJob, model: torch.nn.Module, desk: Desk, waiting: set[Key]
    ) -> None:
        self.config, self.job, self.model, self.desk = config, job, model, desk
        self.waiting = waiting
        self.text = None if job.tokenizer is None else load_tokenizer(job.tokenizer).decode

    def run(self, decodings: Sequence[Decoding]) -> None:
        """Likelihoods, then texts; each decoding of a task begins with an empty cache."""
        if decodings:
            self._check()
        self._score()
        self._decode_greedily()
        for decoding in decodings:
            for _, alike in groupby(self.job.generations, key=_how):
                self._generate(decoding, list(alike))

    def _check(self) -> None:
        """What cannot be decoded is said before the first forward."""
        decoder = self._decoder_of_texts(Method(ONE_BY_ONE))
        for each in self.job.generations:
            try:
                decoder.check(each.number, each.tokens, self._limits(each))
            except BadInput as fault:
                raise BadInput(f"Task {each.task}: {fault}") from None

    def _score(self) -> None:
        job, length = self.job, self.config.data.sequence_length
        scorer = Scorer(self.config, self.model, job.block_size, draws=job.draws, seed=job.seed)
        for _, alike in groupby(self._open(job.scores), key=lambda score: (score.kind, score.task)):
            scores = {score.number: score for score in alike}
            exact = job.block_size == 0
            pairs = [
                windows(each.number, each.context, each.continuation, length, exact=exact)
                for each in scores.values()
            ]
            text_of = {pair.number: each for each, its in zip(scores, pairs, strict=True) for pair in its}
            sizes = {each: len(its) for each, its in zip(scores, pairs, strict=True)}
            found: dict[int, list[Likelihood]] = {}
            self.desk.starts()
            for one in scorer.run([pair for its in pairs for pair in its]):
                number = text_of[one.number]
                found.setdefault(number, []).append(one)
                if len(found[number]) == sizes[number]:
                    whole = of_windows(number, found.pop(number))
                    said: dict[str, Any] = {"nats": whole.nats, "se": whole.se}
                    if whole.is_greedy is not None:
                        said["is_greedy"] = whole.is_greedy
                    self.desk.add(scores[number], scores[number].kind, **said)

    def _open(self, scores: Sequence[Score]) -> list[Score]:
        return [each for each in scores if (each.kind, "", each.task, each.number) in self.waiting]

    def _decode_greedily(self) -> None:
        """Whether each continuation is what decoding one token at a time writes.

        A context is decoded once for all its continuations, as far as the longest goes: what is behind a
        block changes nothing in it. Where a block is the whole sequence, as LLaDA's, the decoder is told the
        length, as public code does it.
        """
        size, length = self.job.block_size, self.config.data.sequence_length
        sees_all = size >= length
        asked: dict[tuple[tuple[int, ...], int], list[Score]] = {}
        for score in self.job.scores:
            if (GREEDY, "", score.task, score.number) not in self.waiting:
                continue
            room = length if sees_all else length - length % size
            (first, *others) = windows(0, score.context, score.continuation, room, exact=False)
            if others:  # longer than the context: nothing could decode it
                self.desk.add(score, GREEDY, is_greedy=False)
            else:
                count = len(score.continuation) if sees_all else 0
                asked.setdefault((tuple(first.context), count), []).append(score)
        if not asked:
            return
        texts = list(asked.items())

        def new_tokens(place: int) -> int:
            return 0 if sees_all else max(len(score.continuation) for score in texts[place][1])

        decoder = self._decoder(Method(ONE_BY_ONE))
        self.desk.starts()
        for limit, places in groupby(sorted(range(len(texts)), key=new_tokens), key=new_tokens):
            prompts = []
            for place in places:
                context, count = texts[place][0]
                masks = (self.config.model.mask_token_id,) * count
                prompts.append(Prompt(context + masks, has_holes=sees_all, number=place))
            for event in decoder.run(prompts, Limits(limit)):
                if isinstance(event, Result):
                    (context, _), scores = texts[event.prompt]
                    written = event.tokens.tolist()[len(context) if sees_all else 0 :]
                    for score in scores:
                        is_greedy = written[: len(score.continuation)] == list(score.continuation)
                        self.desk.add(score, GREEDY, is_greedy=is_greedy)

    def _generate(self, decoding: Decoding, asked: Sequence[Generation]) -> None:
        waiting = {
            each.number: each
            for each in asked
            if (GENERATE, decoding.name, each.task, each.number) in self.waiting
        }
        if not waiting:
            return
        first = next(iter(waiting.values()))
        decoder = self._decoder_of_texts(self._method(decoding, first))
        prompts = [Prompt(each.tokens, number=number) for number, each in waiting.items()]
        self.desk.starts()
        forwards = 0
        for event in decoder.run(prompts, self._limits(first)):
            if isinstance(event, Result):
                self.desk.add(
                    waiting[event.prompt],
                    GENERATE,
                    decoding.name,
                    text=event.text,
                    tokens=event.tokens.tolist(),
                    decided_at=event.decided_at.tolist(),
                    edited=np.flatnonzero(event.is_edited).tolist(),
                    stop=event.stop.value,
                    forwards=event.forwards,
                    spent_forwards=decoder.counts.forwards - forwards,
                )
                forwards = decoder.counts.forwards

    def _method(self, decoding: Decoding, asked: Generation) -> Method:
        settings = {**asked.sampling, **decoding.settings}
        is_drawn = float(settings.get("temperature", 0)) > 0
        chosen = settings if is_drawn else decoding.settings
        return method_of(decoding.rule, chosen, self.config.levenshtein.orders)

    def _limits(self, asked: Generation) -> Limits:
        return Limits(asked.new_tokens, self.job.end_tokens, asked.strings, self.job.max_forwards)

    def _decoder_of_texts(self, method: Method) -> Decoder:
        full = None if self.job.full is None else full_attention_of(self.job.full)
        kind = kind_of(full, next_tokens=not self.job.block_size)
        return self._decoder(method, kind, self.job.filled_block)

    def _decoder(
        self, method: Method, kind: Callable[..., Decoder] = Decoder, block_size: int = 0
    ) -> Decoder:
        return kind(
            self.model,
            method.rule,
            buffer=method.buffer,
            lookahead=method.lookahead,
            block_size=block_size or self.job.block_size,
            mask_token_id=self.config.model.mask_token_id,
            context=self.config.data.sequence_length,
            batch=self.job.batch,
            max_cached_tokens=self.job.max_cached_tokens,
            seed=self.job.seed,
            cuda_graphs=self.job.cuda_graphs,
            text=self.text,
        )


def _how(asked: Generation) -> Any:
    """Requests that a decoder can answer together."""
    return asked.task, asked.new_tokens, tuple(asked.strings), sorted(asked.sampling.items())
