"""Files that travel with weights, and whether the mask token is the one that was meant."""

from __future__ import annotations

import shutil
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.data.tokenizer import MASK_NAMES
from llada_megatron.record.carried import CARRIED

VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model*",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "*.tiktoken",
    "tiktoken.model",
)
"""Without one of these there is no tokenizer."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
CONFIG_FILES = ("config.json", "generation_config.json")
CODE_FILES = ("*.py",)


def mask_token(
    directory: Path, stated_id: int | None, stated_token: str | None, described_id: int | None = None
) -> int:
    """The id of the mask token, checked against tokenizer.json where there is one.

    Where neither `stated_id` nor the tokenizer says it, it is `described_id`, that of config.json. An id
    that is another token's is refused unless `stated_token` says which token it is: in Ling 2.0's tokenizer
    156895, LLaDA2's mask, ends a chat turn. Raises BadInput when no id is known.
    """
    said = f"--mask-token-id {stated_id}"
    if not (directory / "tokenizer.json").is_file():
        stated_id = described_id if stated_id is None else stated_id
        if stated_id is None:
            raise BadInput(f"{directory} has no tokenizer.json to name the mask token: give --mask-token-id.")
        return stated_id
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{directory}/tokenizer.json cannot be read: {error}.") from error
    named = next((name for name in MASK_NAMES if tokenizer.token_to_id(name) is not None), None)
    if stated_id is None and named is not None:
        found = tokenizer.token_to_id(named)
        assert found is not None
        return found
    if stated_id is None:
        if described_id is None:
            raise BadInput(f"The tokenizer of {directory} names no mask token: give --mask-token-id.")
        stated_id, said = described_id, f"mask_token_id={described_id} of config.json"
    token = tokenizer.id_to_token(stated_id)
    if stated_token is not None and token != stated_token:
        raise BadInput(f"--mask-token {stated_token}: in the tokenizer, id {stated_id} is {token or 'free'}.")
    if stated_token is None and token not in (None, named):
        raise BadInput(
            f"{said} is {token} in the tokenizer of {directory}: give a free id as --mask-token-id,"
            f" or --mask-token '{token}' if no text contains it."
        )
    if stated_token is None and token is None and named is not None:
        raise BadInput(
            f"{said} is free, but the tokenizer's mask is {named},"
            f" {tokenizer.token_to_id(named)}: give that id."
        )
    return stated_id


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary."""
    return any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern))


def require_tokenizer(folder: Path) -> None:
    """Raise BadInput where `--tokenizer` is given a folder without one."""
    if not has_tokenizer(folder):
        raise BadInput(
            f"--tokenizer {folder} is no directory with a tokenizer (tokenizer.json, tokenizer.model, ...):"
            " give the directory that holds its files."
        )


def carry_in(source: Path, checkpoint: Path) -> None:
    """Copy configurations, tokenizer and model code of a Hugging Face directory into the checkpoint."""
    (checkpoint / CARRIED).mkdir()
    _copy(source, checkpoint / CARRIED, (*CONFIG_FILES, *TOKENIZER_FILES, *CODE_FILES))


def carry_out(target: Path, *, tokenizer: Path | None, code: Path | None) -> None:
    """Copy a folder's tokenizer and chat templates, and the model code of one; None: of none."""
    for folder, patterns in ((tokenizer, TOKENIZER_FILES), (code, CODE_FILES)):
        if folder is not None:
            _copy(folder, target, patterns)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for path in (path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file()):
        to = target / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, to)
