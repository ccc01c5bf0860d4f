"""Conversations as people write them, to messages, and messages to tokens with their roles.

{"messages": [{"role": "user", "content": ...}, ...]}         also "conversations" with from and value
{"prompt": ..., "response": ...}                              also "completion"
{"prompt": ..., "chosen": ..., "rejected": ...}               preferences: texts, or lists of messages
{"chosen": [messages], "rejected": [messages]}                the same up to their last message

A text "system" beside any of them comes first. A field that is null, as columns of parquet are, is absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from llada_megatron.config.errors import BadInput
from llada_megatron.data.chat_template import ASSISTANT, ChatTemplate, Message, refuse_characters
from llada_megatron.data.containers import BadRecord, Record
from llada_megatron.data.conversations import ANSWER, ROLES
from llada_megatron.data.tokenizer import Tokenizer

_DEFUSED = "\ue002"  # private use: inside the name of a special token that a message merely mentions
SHARE_GPT = {"human": "user", "gpt": ASSISTANT, "function_call": ASSISTANT, "observation": "tool"}
"""Roles of `conversations` by another name."""


class ChatEncoder:
    """Conversations to tokens: a template, the tokenizer that it is for, and which answers are supervised."""

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, *, only_last: bool, parse_special: bool = False
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.only_last, self.parse_special = only_last, parse_special

    def encode(self, messages: list[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 [n] and roles uint8 [n] (data/conversations.py), each piece tokenized by itself.

        What a model is given and what it answers are apart in use too. A special token's name in a message
        is text unless `parse_special`. Raises BadInput as ChatTemplate.spans.
        """
        refuse_characters(messages, _DEFUSED)
        if not self.parse_special:
            messages = [{**m, "content": self.tokenizer.defused(m["content"], _DEFUSED)} for m in messages]
        ids, roles = [], []
        for span in self.template.spans(messages, only_last=self.only_last):
            parts = span.text.split(_DEFUSED)
            found = [token for part in parts for token in self.tokenizer.encode(part, parse_special=True)]
            role = ROLES.index(span.role) if span.role in ROLES else 0
            ids += found
            roles += [role | (ANSWER if span.is_answer else 0)] * len(found)
        if not any(role & ANSWER for role in roles):
            raise BadInput("its answers are no tokens")
        return np.array(ids, np.int64), np.array(roles, np.uint8)

    def prompt(self, messages: list[Message]) -> list[int]:
        """Ids of a conversation up to where an answer begins, as `encode` has them. Raises BadInput."""
        refuse_characters(messages, _DEFUSED)
        if not self.parse_special:
            messages = [{**m, "content": self.tokenizer.defused(m["content"], _DEFUSED)} for m in messages]
        parts = [part for piece in self.template.prompt(messages) for part in piece.split(_DEFUSED)]
        return [token for part in parts for token in self.tokenizer.encode(part, parse_special=True)]

    def end_of_answer(self, messages: list[Message]) -> int | None:
        """The special token that the template writes behind an answer; None where it writes none."""
        tail = self.template.after_answer(messages)
        ids = self.tokenizer.encode(tail, parse_special=True)
        return ids[0] if ids and ids[:1] != self.tokenizer.encode(tail)[:1] else None

    def conversations(self, record: Record, format: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Ids and roles of each conversation of a record; raises BadRecord for what is not of the format."""
        try:
            if isinstance(record, str):
                raise BadInput("it is plain text")
            given = {key: value for key, value in record.items() if value is not None}
            made = [self.encode(messages) for messages in CONVERSATIONS[format](given)]
            if format == "preference" and np.array_equal(made[0][0], made[1][0]):
                raise BadInput("`chosen` and `rejected` are equal once the template has rendered them")
            return made
        except BadInput as fault:
            raise BadRecord(f"is no {format}: {fault}") from fault


def messages_of(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a chat; raises BadInput, a sentence without its place, for a record that holds none."""
    if "messages" in record:
        return _after_system(record, _messages(record["messages"], "messages"))
    if "conversations" in record:
        turns = _list(record["conversations"], "conversations")
        named = [
            {"role": SHARE_GPT.get(str(t.get("from")), t.get("from")), "content": t.get("value")}
            for t in turns
        ]
        return _after_system(record, _messages(named, "conversations"))
    answer = next((key for key in ("response", "completion") if key in record), None)
    if "prompt" not in record or answer is None:
        raise BadInput(
            "it has neither `messages`, nor `conversations`, nor `prompt` with `response` or `completion`"
        )
    return [*_prompt(record), *_side(record, answer)]


def messages_to_answer(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a chat that waits for an answer; BadInput as `messages_of`, and where it has one."""
    messages = _messages(record["messages"], "messages") if "messages" in record else _prompt(record)
    if messages[-1]["role"] == ASSISTANT:
        raise BadInput("its last message is an answer already")
    return messages


def megatron_lm_of(record: Mapping[str, Any]) -> list[list[Message]]:
    """The conversations of a record of Megatron-LM's SFT, where each begins with a system message.

    Its SFTDataset splits `messages` at every one, which other chats may have in the middle. BadInput as
    `messages_of`.
    """
    messages = messages_of(record)
    starts = [index for index, message in enumerate(messages) if message["role"] == "system" or index == 0]
    return [messages[start:stop] for start, stop in pairwise([*starts, len(messages)])]


def preference_of(record: Mapping[str, Any]) -> tuple[list[Message], list[Message]]:
    """The chosen and the rejected conversation of a pair; BadInput as `messages_of`."""
    if missing := [key for key in ("chosen", "rejected") if key not in record]:
        raise BadInput(f"it has no `{missing[0]}`")
    prompt = _prompt(record) if "prompt" in record else []
    chosen, rejected = (_side(record, key) for key in ("chosen", "rejected"))
    if prompt and chosen[: len(prompt)] != prompt:  # else a side repeats the prompt
        chosen, rejected = [*prompt, *chosen], [*prompt, *rejected]
    if chosen == rejected:
        raise BadInput("`chosen` and `rejected` are equal")
    if chosen[:-1] != rejected[:-1]:
        raise BadInput("`chosen` and `rejected` differ before their last message")
    return chosen, rejected


CONVERSATIONS: dict[str, Callable[[Mapping[str, Any]], Sequence[list[Message]]]] = {
    "chat": lambda record: [messages_of(record)],
    "preference": preference_of,
    "megatron-lm": megatron_lm_of,
}
"""By `--format`: a record's conversations."""


def _prompt(record: Mapping[str, Any]) -> list[Message]:
    prompt = record["prompt"]
    messages = _messages(prompt, "prompt") if isinstance(prompt, list) else _text_as("user", prompt, "prompt")
    return _after_system(record, messages)


def _after_system(record: Mapping[str, Any], messages: list[Message]) -> list[Message]:
    """The messages, after the text `system` beside them where there is one and they do not begin so."""
    if not record.get("system") or messages[0]["role"] == "system":
        return messages
    return [*_text_as("system", record["system"], "system"), *messages]


def _side(record: Mapping[str, Any], key: str) -> list[Message]:
    value = record[key]
    messages = _messages(value, key) if isinstance(value, list) else _text_as(ASSISTANT, value, key)
    if messages[-1]["role"] != ASSISTANT:
        raise BadInput(f"`{key}` does not end with a message of the role `assistant`")
    return messages


def _text_as(role: str, text: Any, key: str) -> list[Message]:
    if not isinstance(text, str) or not text.strip():
        raise BadInput(
            f"`{key}` is {'empty' if text in ('', None) or isinstance(text, str) else 'not a text'}"
        )
    return [{"role": role, "content": text.encode(errors="replace").decode()}]


def _messages(value: Any, key: str) -> list[Message]:
    messages: list[Message] = []
    for number, message in enumerate(_list(value, key), 1):
        role = message.get("role")
        if role not in ROLES[1:-1]:
            raise BadInput(
                f"message {number} of `{key}` has the role {repr(role)[:40]}: roles are"
                f" {', '.join(ROLES[1:-1])}"
            )
        content = _content(message.get("content"), number, key)
        if not content.strip() and (role == ASSISTANT and not message.get("tool_calls")):
            raise BadInput(f"message {number} of `{key}`, an answer, is empty")
        messages.append({**message, "content": content})
    return messages


def _list(value: Any, key: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(one, Mapping) for one in value):
        raise BadInput(f"`{key}` is not a list of messages")
    return value


def _content(content: Any, number: int, key: str) -> str:
    """Text, or parts of type text one after the other."""
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else texts
    if content is None:
        return ""
    if not isinstance(content, str):
        raise BadInput(f"the content of message {number} of `{key}` is not text")
    return content.encode(errors="replace").decode()  # JSON may carry half of a surrogate pair
