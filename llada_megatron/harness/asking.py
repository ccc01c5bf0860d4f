"""Tasks to requests in tokens: prompts and continuations as lm-eval words them, few-shot examples and chats.

A context and its continuation are tokenized together, as lm-eval does it: white space at the context's end
goes to the continuation, and what the whole has more than the context alone is the continuation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat import ChatEncoder
from llada_megatron.data.tokenizer import Tokenizer
from llada_megatron.harness.requests import GENERATE, ROLLING, Generation, Score, digest_of
from llada_megatron.harness.tasks import FEWSHOT_SEED, seeded

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting, the first that is given counts."""
SAMPLING = ("temperature", "top_p", "top_k")
NEW_TOKENS = 256
"""Where neither the task nor the command says how many: lm-eval's own."""


@dataclass
class Wording:
    """Text to tokens, and what limits them."""

    tokenizer: Tokenizer
    encoder: ChatEncoder | None
    """Of chats; None: prompts are text."""
    context: int
    """Positions of the model."""
    block_size: int
    """0: an autoregressive model, which needs a token in front of a first one."""
    new_tokens: int | None = None
    """Before the task's own."""
    strings: Sequence[str] = ()
    """That end a text, beside the task's own."""
    cut: Counter[str] = field(default_factory=Counter)
    """Requests of each task that lost the beginning of their prompt."""
    _chats: dict[str, list[int]] = field(default_factory=dict)

    def chat(self, history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as lm-eval shows it; its tokens are those of `llada generate --chat`.

        Without `add_generation_prompt` its last message is the beginning of the answer.
        """
        assert self.encoder is not None
        answer = "" if add_generation_prompt else history[-1]["content"]
        messages: Any = history if add_generation_prompt else history[:-1]
        text = self.encoder.template.render(messages, add_generation_prompt=True) + answer
        self._chats[text] = self.encoder.prompt(messages) + self.tokenizer.encode(answer)
        return text

    def prompt(self, text: str) -> list[int]:
        """The tokens of a prompt; a model of next tokens begins a text behind the end of a document."""
        if not text and self.block_size == 0:
            return self._first()
        return self._chats.get(text) or self.tokenizer.encode(text, parse_special=self.encoder is not None)

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of what follows it."""
        if context in self._chats:  # a question and its answer are tokenized apart, as for training
            return self._chats[context], self.tokenizer.encode(continuation)
        if not context:
            return self.prompt(context), self.tokenizer.encode(continuation)
        before = self.prompt(context.rstrip())
        return before, self.prompt(context + continuation)[len(before) :]

    def _first(self) -> list[int]:
        if self.tokenizer.end_of_document_id is None:
            raise BadInput(
                "The tokenizer names no end of a document, after which an autoregressive model could begin a"
                " text: take a task whose contexts are not empty."
            )
        return [self.tokenizer.end_of_document_id]


def requests_of(
    tasks: Mapping[str, Any], wording: Wording, *, limit: float | None
) -> tuple[list[Generation], list[Score]]:
    """Every request of the tasks, and with each task's `instances` what they are in text.

    Raises BadInput, with the task's name, for what cannot be asked.
    """
    generations, scores = [], []
    for task in tasks.values():
        build(task, wording, limit=limit)
        repeated = [each for each in task.instances for _ in range(each.repeats or 1)]
        for task_name, number, instance in numbered(repeated):
            asked: dict[str, Any] = {
                "kind": instance.request_type,
                "task": task_name,
                "number": number,
                "digest": digest_of(instance.args),
            }
            try:
                if instance.request_type == GENERATE:
                    generations.append(_generation(asked, instance.args, wording))
                else:
                    scores.append(_score(asked, instance.args, wording, wants_greedy(task)))
            except BadInput as fault:
                raise BadInput(f"Task {task_name}: {fault}") from None
    return generations, scores


def build(task: Any, wording: Wording, *, limit: float | None) -> None:
    """Let lm-eval make the requests of a task, the same each time."""
    from lm_eval.evaluator_utils import get_sample_size

    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    with seeded(), redirect_stderr(StringIO()):  # its bar of progress
        task.build_all_requests(
            limit=get_sample_size(task, limit), rank=0, world_size=1, **chat_arguments(wording)
        )


def chat_arguments(wording: Wording) -> dict[str, Any]:
    """Arguments of lm-eval's that say whether questions are chats; few-shot examples are turns of them."""
    is_chat = wording.encoder is not None
    return {
        "apply_chat_template": is_chat,
        "fewshot_as_multiturn": is_chat,
        "chat_template": wording.chat if is_chat else None,
    }


def numbered(instances: Iterable[Any]) -> Iterator[tuple[str, int, Any]]:
    """(task, number among those of its task and kind, instance) of requests."""
    found: Counter[tuple[str, str]] = Counter()
    for instance in instances:
        name = str(instance.task_name)
        yield name, found[name, instance.request_type], instance
        found[name, instance.request_type] += 1


def wants_greedy(task: Any) -> bool:
    """Whether a metric of the task reads that a continuation is what greedy decoding gives."""
    reads = {"loglikelihood": "acc", "multiple_choice": "exact_match"}.get(task.get_config("output_type"))
    return reads is not None and (
        reads in getattr(task, "_metric_fn_list", {}) or callable(task.get_config("process_results"))
    )


def _score(asked: dict[str, Any], args: tuple[Any, ...], wording: Wording, greedy: bool) -> Score:
    if asked["kind"] == ROLLING:
        context, continuation = wording.pair("", args[0])
        return Score(**asked, context=context, continuation=continuation)
    context, continuation = wording.pair(args[0], args[1])
    if len(context) + len(continuation) > wording.context:
        wording.cut[asked["task"]] += 1
    return Score(**asked, context=context, continuation=continuation, wants_greedy=greedy)


def _generation(asked: dict[str, Any], args: tuple[Any, ...], wording: Wording) -> Generation:
    given = dict(args[1])
    until = given.pop("until", None) or []
    lengths = [value for name in LENGTHS if (value := given.pop(name, None)) is not None]
    new_tokens = wording.new_tokens or int(lengths[0] if lengths else NEW_TOKENS)
    is_drawn = given.pop("do_sample", None)
    sampling = {name: str(value) for name in SAMPLING if (value := given.pop(name, None)) is not None}
    if is_drawn is False or float(sampling.get("temperature", 0)) == 0:
        sampling = {}
    if given:
        others = ", ".join(f"{name}={value}" for name, value in given.items())
        served = ", ".join(("until", "do_sample", LENGTHS[0], *SAMPLING))
        raise BadInput(f"its generation_kwargs hold {others}, which decoding does not have: give {served}.")
    strings = [*([until] if isinstance(until, str) else until), *wording.strings]
    size = wording.block_size or 1
    room = wording.context // size * size - new_tokens
    if room < 1:
        raise BadInput(
            f"it asks for {new_tokens} new tokens, and the model's context is {wording.context}: give fewer"
            " with --max-new-tokens."
        )
    tokens = wording.prompt(args[0])
    wording.cut[asked["task"]] += len(tokens) > room
    return Generation(
        **asked,
        tokens=tokens[-room:],
        new_tokens=new_tokens,
        strings=tuple(string for string in strings if string),
        sampling=sampling,
    )
