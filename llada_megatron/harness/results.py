"""Answers to lm-eval's results: scores with their errors, samples, and what decoding cost."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from itertools import islice
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import handle_non_serializable

from llada_megatron.config.errors import BadInput
from llada_megatron.harness.asking import Wording, chat_arguments, numbered
from llada_megatron.harness.requests import GENERATE, GREEDY, ROLLING, SCORE, Key, digest_of, key_of
from llada_megatron.harness.tasks import FEWSHOT_SEED, said_of, seeded

RESAMPLES = 1000
"""For errors of metrics that are no means: within a fortieth of them; lm-eval's 100,000 take minutes."""
SHOWN = 3
"""Answers of a task that a page shows."""
Answers = Mapping[Key, Mapping[str, Any]]


class Answered(LM):
    """To lm-eval a model, which has answered everything already, texts under one decoding."""

    def __init__(self, answers: Answers, decoding: str, wording: Wording) -> None:
        super().__init__()
        self._answers, self._decoding, self._wording = answers, decoding, wording

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's cache of requests, which is off."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        return self._wording.chat(chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The texts."""
        return [answer["text"] for _, _, answer in self._of(requests, GENERATE, self._decoding)]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Nats, and whether greedy decoding gives the continuation: False where no metric reads it."""
        found = []
        for task, number, answer in self._of(requests, SCORE):
            greedy = self._answers.get((GREEDY, "", task, number), answer)
            found.append((answer["nats"], bool(greedy.get("is_greedy", False))))
        return found

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Nats of whole texts."""
        return [answer["nats"] for _, _, answer in self._of(requests, ROLLING)]

    def text_of(self, task: str, number: int) -> Mapping[str, Any] | None:
        """The answer of a task that asks for texts."""
        return self._answers.get((GENERATE, self._decoding, task, number))

    def _of(
        self, requests: Iterable[Any], kind: str, decoding: str = ""
    ) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        for task, number, instance in numbered(requests):
            answer = self._answers.get((kind, decoding, task, number))
            if answer is None or answer["digest"] != digest_of(instance.args):
                raise BadInput(
                    f"Task {task} asks something else each time: draw its questions with a seed of their own."
                )
            yield task, number, answer


def results_of(
    loaded: dict[str, Any],
    answers: list[dict[str, Any]],
    decoding: Mapping[str, Any],
    wording: Wording,
    *,
    limit: float | None,
    model: Mapping[str, Any],
    allows_code: bool,
) -> dict[str, Any]:
    """lm-eval's results under one decoding, in plain JSON, with `llada`: the model, the decoding, the cost.

    loaded: of `tasks.load`; decoding: its `name` (empty without any), `rule` and `settings`; model: what is
    said of it. Raises BadInput for a task whose scoring fails.
    """
    import lm_eval

    lm = Answered({key_of(answer): answer for answer in answers}, decoding["name"], wording)
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    chat = {name: value for name, value in chat_arguments(wording).items() if name != "chat_template"}
    with said_of(" and ".join(loaded["tasks"]), "is not scored"), seeded(), redirect_stdout(sys.stderr):
        found: Any = lm_eval.evaluate(
            lm,
            loaded,
            limit=limit,
            bootstrap_iters=RESAMPLES,
            confirm_run_unsafe_code=allows_code,
            log_samples=True,
            **chat,
        )
    config = {"model": "llada", "model_args": dict(model), "limit": limit, "fewshot_seed": FEWSHOT_SEED}
    cost = {name: cost_of(answers, name, decoding["name"]) for name in loaded["tasks"]}
    cut = {name: count for name, count in wording.cut.items() if count}
    shown = {name: shown_of(loaded["tasks"][name], found["samples"][name], lm, wording) for name in cost}
    return {
        **json.loads(json.dumps(found, default=handle_non_serializable)),
        "config": config,
        "date": time.time(),
        "lm_eval_version": version("lm_eval"),
        "llada": {**model, "decoding": dict(decoding), "cost": cost, "prompts_cut": cut, "shown": shown},
    }


def cost_of(answers: Iterable[Mapping[str, Any]], task: str, decoding: str) -> dict[str, Any]:
    """What the texts of a task took, and its likelihoods; empty parts are left out.

    A text's forwards are those that it took part in, and `tokens_per_forward` counts those that were no
    prefill. A forward serves several texts, so `ms_per_forward` is of `batched_forwards`.
    """
    mine = [each for each in answers if each["task"] == task]
    texts = [each for each in mine if each["kind"] == GENERATE and each["decoding"] == decoding]
    scores = [each for each in mine if each["kind"] in (SCORE, ROLLING)]
    found: dict[str, Any] = {}
    if texts:
        tokens, seconds = sum(len(each["tokens"]) for each in texts), sum(each["spent_sec"] for each in texts)
        batched, forwards = sum(each["spent_forwards"] for each in texts), Counter[str]()
        for each in texts:
            forwards.update(each["forwards"])
        found |= {
            "texts": len(texts),
            "tokens": tokens,
            "tokens_per_forward": tokens / max(1, forwards["denoise"] + forwards["store"]),
            "forwards": dict(forwards),
            "batched_forwards": batched,
            "ms_per_forward": 1000 * seconds / max(1, batched),
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "seconds": seconds,
            "stops": dict(Counter(each["stop"] for each in texts)),
        }
    if scores:
        errors = [each["se"] for each in scores if each["se"] is not None]
        found |= {
            "likelihoods": len(scores),
            "likelihood_seconds": sum(each["spent_sec"] for each in mine if each["kind"] != GENERATE),
            "nats_se": (sum(error**2 for error in errors) / len(errors)) ** 0.5 if errors else None,
        }
    return found


def shown_of(
    task: Any, samples: Iterable[Mapping[str, Any]], lm: Answered, wording: Wording
) -> list[dict[str, Any]]:
    """A task's first answers for the eye: `question`, `target`, `scores` by metric; the tokens as `pieces` of
    text with the forward that each was `decided_at` and whether it `is_edited`."""
    found = []
    for number, sample in enumerate(islice(samples, SHOWN)):
        answer = lm.text_of(task.task_name, number)
        if answer is None:
            continue
        pieces = [wording.tokenizer.decode([token]) for token in answer["tokens"]]
        scores = {name: sample[name] for name in sample["metrics"]}
        found.append(
            {
                "question": str(task.doc_to_text(sample["doc"])),
                "target": str(sample["target"]),
                "scores": {name: value for name, value in scores.items() if isinstance(value, int | float)},
                "pieces": pieces,
                "decided_at": answer["decided_at"],
                "is_edited": [place in answer["edited"] for place in range(len(pieces))],
            }
        )
    return found
