"""Conversations in files and what reads them: chats, preferences, templates, roles, a reference's scores."""

import json
from pathlib import Path

import numpy as np

from llada_megatron import cli
from llada_megatron.config.errors import BadInput
from llada_megatron.data import prepare
from llada_megatron.data.chat import ChatEncoder
from llada_megatron.data.chat_template import load_template
from llada_megatron.data.containers import BadRecord
from llada_megatron.data.conversations import ANSWER, ROLES
from llada_megatron.data.documents import Preparation
from llada_megatron.data.sources import find_sources
from llada_megatron.data.tokenizer import load_tokenizer

TURNS = [
    {"role": "system", "content": "some text"},
    {"role": "user", "content": "text"},
    {"role": "assistant", "content": "some", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]},
    {"role": "tool", "content": [{"type": "text", "text": "some"}]},
    {"role": "assistant", "content": "text text"},
]
CHATS = [
    {"messages": TURNS},
    {"system": "some", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"prompt": "some text", "response": "text", "source": 3},
]
PAIRS = [
    {"prompt": "some", "chosen": "text", "rejected": "some text"},
    {"chosen": TURNS, "rejected": [*TURNS[:-1], {"role": "assistant", "content": "some"}]},
]
CHATML = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant ' }}{% generation %}{{ message.content|trim + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{- '<|im_start|>' + message.role + ' ' + message['content'] + '<|im_end|>' }}{% endif %}
{%- if message.tool_calls %}{{ message.tool_calls | tojson(indent=2) }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant ' }}{% endif %}"""


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<|endoftext|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "[UNK]", "some", "text"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:4])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_chats(folder: Path) -> None:
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    (folder / "chat.json").write_text(json.dumps(CHATS[:2]))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    (folder / "pair.json").write_text(json.dumps(PAIRS))


def read_records(folder: Path, file: str, format: str) -> None:
    """As the workers of `llada data prepare` do."""
    sources, _ = find_sources([folder / file], [])
    for block in prepare._blocks(sources):
        encoded = prepare._encode(block, Preparation(format=format), np.uint16)
        if encoded.bad:
            raise BadInput(encoded.bad[0])
        assert len(encoded.roles) == len(encoded.tokens) == sum(encoded.lengths)
        assert all(
            (roles >= ANSWER).any() for roles in np.split(encoded.roles, np.cumsum(encoded.lengths))[:-1]
        )


def make_template(folder: Path) -> None:
    make_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(CHATML)


def make_tokenizer_config(folder: Path) -> None:
    make_tokenizer(folder)
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": ""}]
    described = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None, "chat_template": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def read_template(folder: Path) -> None:
    tokenizer = load_tokenizer(f"{folder}/tokenizer.json")
    template = load_template(None, f"{folder}/tokenizer.json", tokenizer)
    for only_last in (False, True):
        encoder = ChatEncoder(template, tokenizer, only_last=only_last)
        try:
            ((ids, roles),) = encoder.conversations(CHATS[0], "chat")
        except BadRecord as phrase:
            raise BadInput(f"{folder} {phrase}") from None
        assert len(ids) == len(roles) and (roles >= ANSWER).any()


def make_corpus(folder: Path) -> None:
    """A corpus of preferences, as `prepare_corpus` writes it, and scores of it."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from llada_megatron.objectives.reference import write_scores

    prefix, lengths = folder / "pairs", [5, 7, 3, 9]
    of_answer = ROLES.index("assistant") | ANSWER
    tokens = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    roles = IndexedDatasetBuilder(f"{prefix}.roles.bin", dtype=np.uint8)
    for length in lengths:
        tokens.add_document(np.arange(65, 65 + length), [length])
        roles.add_document(np.array([1, 2] + [of_answer] * (length - 2)), [length])
    tokens.finalize(f"{prefix}.idx")
    roles.finalize(f"{prefix}.roles.idx")
    bytes_ = load_tokenizer("bytes")
    said = {
        "tokenizer": "bytes", "tokenizer_sha256": bytes_.sha256, "vocab_size": 258, "tokens": sum(lengths),
        "bytes": sum(lengths), "end_of_document_id": 256, "format": "preference", "lowest_id": 65,
        "highest_id": 73,
    }  # fmt: skip
    (folder / "pairs.json").write_text(json.dumps(said))
    write_scores(str(prefix), np.ones((len(lengths), 2)), {"run.seed": 1})


def read_corpus(folder: Path) -> None:
    arguments = ["inspect", f"{folder}/pairs", "--sequence-length", "32", "--pad-to", "4"]
    module, parsed = cli.parse("data", arguments)
    module.run(parsed)


def read_scores(folder: Path) -> None:
    from llada_megatron.objectives.reference import ReferenceScores, _read

    prefix = f"{folder}/pairs"
    bounds, said = _read(prefix)
    scores = ReferenceScores({prefix: bounds}, [], 32)
    said.get("run.seed")
    for document in range(4):
        assert scores.of(prefix, document).dtype == np.float64
