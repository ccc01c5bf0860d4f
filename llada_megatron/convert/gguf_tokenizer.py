"""tokenizer.json and tokenizer_config.json from the vocabulary and merges inside a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llada_megatron.config.errors import BadInput
from llada_megatron.convert.safetensors_files import write_json

NORMAL, CONTROL = 1, 3
"""Kinds of tokens (gguf.TokenType); a control token stands for no text."""


def write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    """Write both files; BadInput for a tokenizer of another kind than SmolLM2's.

    That is byte-level BPE as in GPT-2, after every digit has been split off. `tokenizer.ggml.pre` names how
    text is split before BPE, which the file does not describe otherwise.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind, split = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if (kind, split) != ("gpt2", "smollm"):
        raise BadInput(
            f"The GGUF's tokenizer is {kind} with pre-tokenizer {split}: only gpt2 with smollm is served,"
            " take the tokenizer.json of the published model instead."
        )
    tokens, types, merges = _lists(fields)
    if other := sorted({*types} - {NORMAL, CONTROL}):
        raise BadInput(f"The GGUF's vocabulary holds tokens of types {other}: only 1 and 3 are served.")
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if type(index) is not int or not 0 <= index < len(tokens):
                raise BadInput(f"The GGUF's {key}_token_id is {index}: it has {len(tokens)} tokens.")
            described[f"{name}_token"] = tokens[index]
    described["additional_special_tokens"] = special
    if "tokenizer.chat_template" in fields:
        described["chat_template"] = fields["tokenizer.chat_template"]
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", described)


def _lists(fields: dict[str, Any]) -> tuple[list[str], list[int], list[tuple[str, str]]]:
    """Tokens, their types, and the pairs that are merged; BadInput where the three do not fit together."""
    tokens, types, merges = (
        fields.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
    )
    for name, held, kind in (("tokens", tokens, str), ("token_type", types, int), ("merges", merges, str)):
        if not isinstance(held, list) or not all(type(each) is kind for each in held):
            raise BadInput(
                f"The GGUF's tokenizer.ggml.{name} is no list of {kind.__name__}: copy the file again."
            )
    assert isinstance(tokens, list) and isinstance(types, list) and isinstance(merges, list)
    known = set(tokens)
    if len(types) != len(tokens) or len(known) != len(tokens):
        raise BadInput(
            f"The GGUF's vocabulary has {len(tokens)} tokens, {len(known)} of them different, and"
            f" {len(types)} types: copy the file again."
        )
    pairs = []
    for merge in merges:
        first, _, second = merge.partition(" ")
        if not {first, second, first + second} <= known:
            raise BadInput(
                f"The GGUF merges {merge!r}, of which its vocabulary lacks a token: copy the file again."
            )
        pairs.append((first, second))
    return tokens, types, pairs
