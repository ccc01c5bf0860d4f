"""Chat templates: messages to text as transformers renders them, and whose text is whose.

A template is Jinja in a sandbox: it comes with somebody's tokenizer. Which text is an answer is read off the
rendering: of the template's own `{% generation %}` blocks where it has them, else from what the conversation
up to the answer renders to with a generation prompt, and what it renders to with the answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llada_megatron.config.errors import BadInput
from llada_megatron.data.tokenizer import Tokenizer
from llada_megatron.record.json_files import read_json

ASSISTANT = "assistant"
LLADA2 = """\
{{- '<role>SYSTEM</role>' }}
{%- if messages and messages[0].role == 'system' %}{{- messages[0].content + '\\n' }}{% endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- '<role>ASSISTANT</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'tool' %}{{- '<role>OBSERVATION</role>' + message.content + '<|role_end|>' }}
{%- elif message.role == 'user' %}{{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
{%- elif not loop.first %}{{- '<role>SYSTEM</role>' + message.content + '<|role_end|>' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<role>ASSISTANT</role>' }}{% endif %}
"""
"""Turns as LLaDA2.0's model card shows them, thinking switched off."""
PLAIN = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}{{- 'assistant: ' + message.content + eos_token }}
{%- else %}{{- message.role + ': ' + message.content + '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}
"""
"""For a tokenizer that has no marks of turns: an answer ends with the end-of-document token."""
BUILT_IN = {"llada2": (LLADA2, ("<role>", "</role>", "<|role_end|>")), "plain": (PLAIN, ())}
"""Source, and the strings that must be tokens of the tokenizer."""

Message = Mapping[str, Any]
"""`role` and `content`, both text, and whatever else a template reads (`tool_calls`)."""

TOKENIZER_CONFIG = "tokenizer_config.json"
MARK = re.compile(r"<\|[^|<>{}\s]+\|>")
"""What templates write around turns, `<|im_start|>`, and expect to be one token."""

_MOST_CHARACTERS = 2**26
"""That a template may make of a conversation, and of one product; of a number, its bits."""

_OPENED, _CLOSED = "\ue000", "\ue001"  # private use: around what a generation block renders


@dataclass(frozen=True)
class Span:
    """A stretch of rendered text that belongs to one message."""

    text: str
    role: str
    is_answer: bool
    """Whether a model is to learn to write it."""


def refuse_characters(messages: Sequence[Message], *characters: str) -> None:
    """Raise BadInput where messages hold a character that marks a place while they are rendered."""
    text = json.dumps(list(messages), ensure_ascii=False, default=str)  # repr would escape them
    for character in characters:
        if character in text:
            raise BadInput(f"the text holds the private-use character U+{ord(character):04X}: remove it")


class ChatTemplate:
    """A compiled template.

    variables: the tokenizer's special tokens by the names that templates use, such as `eos_token`. `where`
    names the template in messages. Raises BadInput for a source that is no Jinja.
    """

    def __init__(self, source: str, where: str, variables: Mapping[str, str]) -> None:
        self.where, self._variables = where, dict(variables)
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # what its constants are computed to may fail in any way
            raise BadInput(f"{where} is not a Jinja template: {_in_one_line(error)}.") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation's text. Raises BadInput with what the template says against it."""
        rendered = self._rendered(messages, add_generation_prompt)
        return rendered.replace(_OPENED, "").replace(_CLOSED, "")

    def spans(self, messages: Sequence[Message], *, only_last: bool = False) -> list[Span]:
        """The text of a conversation, up to the end of its last answer, in pieces that belong together.

        With `only_last` the earlier answers are context. Raises BadInput for a conversation without an
        answer, one that the template refuses, an answer that it drops, and turns that it renders otherwise
        once others follow.
        """
        refuse_characters(messages, _OPENED, _CLOSED)
        answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
        if not answers:
            raise BadInput("no message has the role `assistant`, so there is nothing to learn")
        messages = messages[: answers[-1] + 1]
        marked = self._rendered(messages)
        text = marked.replace(_OPENED, "").replace(_CLOSED, "")
        if _OPENED in marked:
            stretches = _marked_stretches(marked, self.where)
            if only_last:
                before = len(self.render(messages[:-1], add_generation_prompt=True))
                stretches = [stretch for stretch in stretches if stretch[1] > before]
            if not stretches:
                raise BadInput(f"{self.where} has no {{% generation %}} around the last answer")
        else:
            stretches = [
                self._stretch(messages, index, text) for index in (answers[-1:] if only_last else answers)
            ]
        for index in answers[-1:] if only_last else answers:
            self._require_written(messages, index, text)
        return self._cut(messages, text, stretches)

    def prompt(self, messages: Sequence[Message]) -> list[str]:
        """The text of a conversation up to where an answer begins, in the pieces that `spans` would cut.

        Raises BadInput as `render`.
        """
        text = self.render(messages, add_generation_prompt=True)
        cuts = {0, len(text)}
        for count in range(1, len(messages) + 1):
            for with_prompt in (False, True):
                try:
                    beginning = self.render(messages[:count], add_generation_prompt=with_prompt)
                except BadInput:  # it refuses a conversation that stops here
                    continue
                if text.startswith(beginning):
                    cuts.add(len(beginning))
        return [text[first:last] for first, last in pairwise(sorted(cuts))]

    def after_answer(self, messages: Sequence[Message]) -> str:
        """What the template writes behind an answer to these messages: the mark of its end, if it has one."""
        answer = "\ue003"
        text = self.render([*messages, {"role": ASSISTANT, "content": answer}])
        return text.partition(answer)[2]

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        given = {"messages": list(messages), "tools": None, "documents": None}
        pieces, length = [], 0
        try:
            for piece in self._template.generate(
                {**self._variables, **given, "add_generation_prompt": add_generation_prompt}
            ):
                pieces.append(piece)
                length += len(piece)
                if length > _MOST_CHARACTERS:
                    raise TemplateError(f"it makes more than {_MOST_CHARACTERS:,} characters of it")
        except Exception as error:  # whatever the template's own expressions raise
            raise BadInput(f"{self.where} cannot render it: {_in_one_line(error)}") from error
        return "".join(pieces).encode(errors="replace").decode()  # half a surrogate pair is no text

    def _stretch(self, messages: Sequence[Message], index: int, text: str) -> tuple[int, int]:
        """Where the answer that is messages[index] lies in the whole text."""
        before = self.render(messages[:index], add_generation_prompt=True)
        through = self.render(messages[: index + 1]) if index + 1 < len(messages) else text
        if not (text.startswith(through) and through.startswith(before)):
            raise BadInput(
                f"{self.where} renders message {index + 1} otherwise once others follow it, or its generation"
                " prompt is not how an answer begins: supervise the last answer alone, or put"
                " {% generation %} around the answers of the template"
            )
        return len(before), len(through)

    def _require_written(self, messages: Sequence[Message], index: int, text: str) -> None:
        """The rendering depends on the answer: what a template reshapes counts, what it drops does not."""
        if str(messages[index].get("content", "")).strip() not in text:
            other = [*messages[:index], {**messages[index], "content": "."}, *messages[index + 1 :]]
            if self.render(other) == text:
                raise BadInput(f"{self.where} drops the answer, message {index + 1}")

    def _cut(self, messages: Sequence[Message], text: str, stretches: list[tuple[int, int]]) -> list[Span]:
        """Pieces of the text up to the end of the last stretch: at the ends of messages, as far as the
        template renders a beginning of the conversation alone, and of answers.
        """
        stop = stretches[-1][1]
        ends = []  # of the messages before the last one
        for count in range(1, len(messages)):
            try:
                beginning = self.render(messages[:count])
            except BadInput:  # it refuses a conversation that stops here
                beginning = text
            ends.append(len(beginning) if text.startswith(beginning) else stop)
        cuts = sorted({0, stop, *(edge for pair in stretches for edge in pair), *ends} & set(range(stop + 1)))
        return [
            Span(
                text[first:last],
                next(
                    (m["role"] for m, end in zip(messages, [*ends, stop], strict=True) if first < end),
                    ASSISTANT,
                ),
                any(start <= first and last <= end for start, end in stretches),
            )
            for first, last in pairwise(cuts)
        ]


def load_template(name: str | None, tokenizer_name: str, tokenizer: Tokenizer) -> ChatTemplate:
    """The template called `name`: of BUILT_IN, or a file of Jinja or a tokenizer_config.json.

    None: what came with the tokenizer.json, chat_template.jinja or tokenizer_config.json beside it; `plain`
    for bytes. Raises BadInput where there is none, and for one whose marks are no tokens of the tokenizer.
    """
    folder = Path(tokenizer_name).parent if tokenizer_name != "bytes" else None
    described = _described(folder / TOKENIZER_CONFIG) if folder else {}
    if name is None and folder is None:
        name = "plain"
    if name in BUILT_IN:
        source, marks, where = *BUILT_IN[name], f"the template `{name}`"
    else:
        source, where = _source(Path(name) if name else None, folder)
        marks = tuple(dict.fromkeys(MARK.findall(source)))
    for mark in marks:
        ids = tokenizer.encode(mark, parse_special=True)
        if len(ids) != 1 or ids[0] == tokenizer.unknown_token_id:
            raise BadInput(
                f"{where} writes {mark}, which is no token of {tokenizer_name}: choose the template that the"
                " tokenizer came with."
            )
    variables = {"bos_token": "", "eos_token": tokenizer.end_of_document or ""}
    for key, value in described.items():
        if key.endswith("_token") and (token := _token(value)) is not None:
            variables[key] = token
    return ChatTemplate(source, where, variables)


def _source(file: Path | None, folder: Path | None) -> tuple[str, str]:
    """A template's source and where it is from: this file, or what lies in the tokenizer's folder."""
    if file is None:
        assert folder is not None
        beside = [folder / "chat_template.jinja", folder / TOKENIZER_CONFIG]
        file = next((each for each in beside if each.is_file()), None)
        if file is None:
            raise BadInput(
                f"{folder} holds neither {beside[0].name} nor {TOKENIZER_CONFIG}: name a template with"
                " --chat-template."
            )
    if file.name.endswith(".json"):
        template = read_json(file, "name another with --chat-template").get("chat_template")
        if isinstance(template, list):  # several by name; the one called default is for chats
            named = [each for each in template if isinstance(each, dict)]
            template = next((t.get("template") for t in named if t.get("name") == "default"), None)
        if not isinstance(template, str):
            raise BadInput(f"{file} holds no chat template: name one with --chat-template.")
        return template, str(file)
    try:
        return file.read_text(encoding="utf-8"), str(file)
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"--chat-template {file} cannot be read ({error}): give a file, or one of {', '.join(BUILT_IN)}."
        ) from None


def _described(path: Path) -> dict[str, Any]:
    return read_json(path, "mend it") if path.is_file() else {}


def _token(value: Any) -> str | None:
    """A special token of tokenizer_config.json, written as text or as an object."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox without huge products and powers, which Jinja computes even where it only compiles.

    It keeps a template from the Python around it. What loops over loops take of time and memory is its own.
    """

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """The product or power; TemplateError for one that is too large."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length()
            size = bits * right if operator == "**" else bits + right.bit_length()
        else:  # a text or a list, so many times
            many, times = (right, left) if isinstance(left, int) else (left, right)
            size = len(many) * times if hasattr(many, "__len__") and isinstance(times, int) else 0
        if size > _MOST_CHARACTERS:
            raise TemplateError(f"a result of {operator} in it is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which Hugging Face's templates put around what a model
    writes.
    """

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return _OPENED + caller() + _CLOSED


def _marked_stretches(marked: str, where: str) -> list[tuple[int, int]]:
    """[start, stop) of every marked stretch, in the text without the marks."""
    before, *others = marked.split(_OPENED)
    if _CLOSED in before or any(piece.count(_CLOSED) != 1 for piece in others):
        raise BadInput(f"{where} has one {{% generation %}} inside another")
    stretches, length = [], len(before)
    for piece in others:
        inside, _, after = piece.partition(_CLOSED)
        stretches.append((length, length + len(inside)))
        length += len(inside) + len(after)
    return stretches


def _in_one_line(error: Exception) -> str:
    """What an error of a template says, which may be the template's own text of any length."""
    words = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return words if len(words) <= 300 else f"{words[:300]}..."


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """As transformers: Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
