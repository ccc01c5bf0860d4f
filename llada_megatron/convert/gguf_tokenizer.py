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
    tokens, types, merges = (
        fields.get(f"tokenizer.ggml.{key}", []) for key in ("tokens", "token_type", "merges")
    )
    are_lists = all(isinstance(values, list) for values in (tokens, types, merges))
    are_texts = are_lists and all(isinstance(text, str) for text in (*tokens, *merges))
    if not are_texts or len(tokens) != len(types) or any(merge.count(" ") != 1 for merge in merges):
        raise BadInput("The GGUF's tokenizer is damaged: it lacks a token's kind, or a merge is no pair.")
    if other := sorted({*types} - {NORMAL, CONTROL}):
        raise BadInput(f"The GGUF's vocabulary holds tokens of types {other}: only 1 and 3 are served.")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, pairs))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"The GGUF's tokenizer is damaged: {error}.") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    described: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_prefix_space": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if (index := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            if not isinstance(index, int) or not 0 <= index < len(tokens):
                raise BadInput(f"The GGUF sets tokenizer.ggml.{key}_token_id={index!r}: it is no token.")
            described[f"{name}_token"] = tokens[index]
    described["additional_special_tokens"] = special
    if "tokenizer.chat_template" in fields:
        described["chat_template"] = fields["tokenizer.chat_template"]
    write_json(directory / "tokenizer_config.json", described)
