"""Answers of a model to requests: greedy continuations, several decodings, and what is answered already."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import LayoutConfig
from llada_megatron.evaluate.answers import (
    ONE_BY_ONE,
    Answering,
    Desk,
    EvaluationJob,
    asked,
    decodings_of,
)
from llada_megatron.generate.reference_loop import Canvas, reference_loop
from llada_megatron.generate.rules import rule_of
from llada_megatron.harness.requests import GENERATE, GREEDY, SCORE, Generation, Score
from llada_megatron.parallel import groups
from tests.generate.models import CONTEXT, MASK, prompt_of, settings, tiny, uncached

CONFIG = settings(f"data.sequence_length={CONTEXT}")


@pytest.fixture(scope="module")
def model():
    groups.initialize(LayoutConfig())
    try:
        yield tiny(CONFIG)
    finally:
        groups.destroy()


def answered(model, job: EvaluationJob, written: list[dict[str, Any]] = []) -> dict[Any, dict[str, Any]]:  # noqa: B006
    decodings = decodings_of(job.rules, job.settings or {})
    keys = list(asked(job, decodings if job.generations else []))
    desk = Desk(job, written, len(keys))
    waiting = {key for key in keys if key not in desk.answers}
    Answering(CONFIG, job, model, desk, waiting).run(decodings if job.generations else [])
    return desk.answers


def job_of(block_size: int, **options: Any) -> EvaluationJob:
    return EvaluationJob(Path(), block_size, **{"generations": [], "scores": [], "draws": 2, **options})


def score(number: int, context: Any, continuation: Any) -> Score:
    return Score(SCORE, "t", number, "", list(context), list(continuation), wants_greedy=True)


def test_greedy_is_what_decoding_one_token_at_a_time_writes(model):
    context = prompt_of(7)
    written, forwards = uncached(model, context, 9, 4, ONE_BY_ONE)
    assert forwards == 9  # a block's end is decoded with it: 7 + 9 is whole blocks
    others = [*written[:-1], (written[-1] + 1) % 480]
    texts = [written, written[:3], others, written[1:], prompt_of(90), []]
    job = job_of(4, scores=[score(n, context, text) for n, text in enumerate(texts)])
    found = answered(model, job)
    greedy = [found[GREEDY, "", "t", number]["is_greedy"] for number in range(len(texts))]
    assert greedy == [True, True, False, False, False, True]


def test_where_a_block_is_the_whole_sequence_greedy_knows_the_length(model):
    context = prompt_of(5)

    def written(count: int) -> np.ndarray:
        tokens = np.concatenate([context, np.full(count, MASK)])
        return reference_loop(model, Canvas(tokens, len(tokens), MASK), ONE_BY_ONE)[0][len(context) :]

    texts = [written(6), written(3), written(6)[::-1]]
    found = answered(model, job_of(CONTEXT, scores=[score(n, context, t) for n, t in enumerate(texts)]))
    assert [found[GREEDY, "", "t", number]["is_greedy"] for number in range(3)] == [True, True, False]


def test_a_rule_takes_the_settings_that_it_has_in_every_combination():
    found = decodings_of(["threshold", "factor"], {"threshold": ["0.5", "0.9"], "temperature": ["0", "1"]})
    assert [each.name for each in found] == [
        *(f"threshold,threshold={t},temperature={d}" for t in ("0.5", "0.9") for d in ("0", "1")),
        *(f"factor,temperature={d}" for d in ("0", "1")),
    ]
    assert len(decodings_of(["factor", "factor"], {"factor": ["1", "1"]})) == 1
    for rules, given, said in (
        (["factor", "quota"], {"kl_threshold": ["1"]}, "kl_threshold is no setting of factor or quota"),
        (["threshold"], {"threshold": ["2"]}, "threshold"),
        (["best"], {}, "There is no rule 'best'"),
    ):
        with pytest.raises(BadInput, match=said):
            decodings_of(rules, given)


def test_texts_are_those_of_each_decoding_and_what_is_written_is_not_asked_again(model):
    prompts = [prompt_of(length) for length in (5, 9)]
    texts = [Generation(GENERATE, "t", n, "", p.tolist(), new_tokens=7) for n, p in enumerate(prompts)]
    drawn = Generation(GENERATE, "u", 0, "", prompts[0].tolist(), new_tokens=7, sampling={"temperature": "1"})
    job = job_of(
        4, generations=[*texts, drawn], rules=["quota", "threshold"], settings={"threshold": ["0.05"]}
    )
    found = answered(model, job)
    assert len(found) == 6
    for decoding in decodings_of(job.rules, job.settings or {}):
        for number, prompt in enumerate(prompts):
            answer = found[GENERATE, decoding.name, "t", number]
            expected, forwards = uncached(model, prompt, 7, 4, rule_of(decoding.rule, decoding.settings))
            assert answer["tokens"] == expected.tolist() and answer["forwards"]["denoise"] == forwards
        tokens = found[GENERATE, decoding.name, "u", 0]["tokens"]
        assert tokens != found[GENERATE, decoding.name, "t", 0]["tokens"]  # the task asks for drawn ones
    kept = {**found[GENERATE, "quota,threshold=0.05", "t", 1], "tokens": [1]}
    again = answered(model, job, [kept])
    assert len(again) == 6 and again[GENERATE, "quota,threshold=0.05", "t", 1]["tokens"] == [1]
    assert again[GENERATE, "quota,threshold=0.05", "t", 0]["tokens"] != [1]
    whole = answered(model, job, list(found.values()))
    assert whole == found


def test_texts_of_full_attention_are_filled_in_its_blocks_and_with_its_cache(model):
    prompt, options = prompt_of(9), {"rules": ["quota"], "settings": {"threshold": ["0.05"]}}
    text = Generation(GENERATE, "t", 0, "", prompt.tolist(), new_tokens=7)
    expected = np.append(prompt, np.full(7, MASK))
    rule = rule_of("quota", {"threshold": 0.05})
    _, forwards = reference_loop(model, Canvas(expected, 4, MASK, full_from=9), rule)
    job = job_of(CONTEXT, generations=[text], filled_block=4, full={}, **options)
    (answer,) = answered(model, job).values()
    assert answer["tokens"] == expected[9:].tolist() and answer["forwards"]["denoise"] == forwards
    (other,) = answered(model, replace(job, full={"cfg_scale": "2"})).values()
    assert other["tokens"] != answer["tokens"]
    assert replace(job, full={"cache": "dual"}).identity != job.identity
