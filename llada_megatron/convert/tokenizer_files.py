"""Files that travel with weights, and whether the mask token is the one that was meant."""

from __future__ import annotations

import shutil
from pathlib import Path

from llada_megatron.config.errors import BadInput
from llada_megatron.data.tokenizer import MASK_NAMES
from llada_megatron.record.manifest import Checkpoint, find

CARRIED = "hf"
"""Folder of a checkpoint that keeps what came with the weights."""
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
CONFIG_FILES = ("config.json", "generation_config.json")


def mask_token(directory: Path, stated_id: int | None, stated_token: str | None) -> int:
    """The id of the mask token, checked against tokenizer.json where there is one.

    An id that is another token's is refused unless `stated_token` says which token it is: in Ling 2.0's
    tokenizer 156895, LLaDA2's mask, ends a chat turn. Raises BadInput when no id is known.
    """
    if not (directory / "tokenizer.json").is_file():
        if stated_id is None:
            raise BadInput(f"{directory} has no tokenizer.json to name the mask token: give --mask-token-id.")
        return stated_id
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{directory}/tokenizer.json cannot be read: {error}.") from error
    named = next((name for name in MASK_NAMES if tokenizer.token_to_id(name) is not None), None)
    if stated_id is None:
        if named is None:
            raise BadInput(f"The tokenizer of {directory} names no mask token: give --mask-token-id.")
        stated_id = tokenizer.token_to_id(named)
        assert stated_id is not None
        return stated_id
    token = tokenizer.id_to_token(stated_id)
    if stated_token is not None and token != stated_token:
        raise BadInput(f"--mask-token {stated_token}: in the tokenizer, id {stated_id} is {token or 'free'}.")
    if stated_token is None and token not in (None, named):
        raise BadInput(
            f"--mask-token-id {stated_id} is {token} in the tokenizer of {directory}: choose a free id,"
            f" or give --mask-token '{token}' if no text contains it."
        )
    if stated_token is None and token is None and named is not None:
        raise BadInput(
            f"--mask-token-id {stated_id} is free, but the tokenizer's mask is {named},"
            f" {tokenizer.token_to_id(named)}: give that id."
        )
    return stated_id


def carry_in(source: Path, checkpoint: Path) -> None:
    """Copy configurations, tokenizer and model code of a Hugging Face directory into the checkpoint."""
    (checkpoint / CARRIED).mkdir()
    names = [*CONFIG_FILES, *TOKENIZER_FILES, *sorted(path.name for path in source.glob("*.py"))]
    _copy(source, checkpoint / CARRIED, names)


def carried(checkpoint: Checkpoint) -> Path | None:
    """The folder that came with the weights: of this checkpoint, or of the one that its run started from."""
    folder = checkpoint.path / CARRIED
    if folder.is_dir():
        return folder
    origin = checkpoint.manifest.config.get("checkpoint", {}).get("init_from")
    if not origin:
        return None
    try:
        return carried(find(origin))
    except BadInput:  # it is no longer there
        return None


def carry_out(folder: Path, target: Path, *, code: bool) -> None:
    """Copy tokenizer files, with `code` the model's .py files too."""
    names = [*TOKENIZER_FILES, *(sorted(path.name for path in folder.glob("*.py")) if code else [])]
    _copy(folder, target, names)


def _copy(source: Path, target: Path, names: list[str]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
