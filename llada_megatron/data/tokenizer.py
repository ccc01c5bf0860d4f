"""Text to token ids and back: bytes, or a tokenizer.json of the user's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from llada_megatron.config.errors import BadInput

# Looked up in this order; the first one in the vocabulary counts.
END_OF_DOCUMENT_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|end_of_document|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "[SEP]",
)
MASK_NAMES = ("<|mask|>", "<|mdm_mask|>", "[MASK]", "<mask>")


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    end_of_document_id: int
    mask_token_id: int | None
    """None when the vocabulary names no mask token; a run then names it in model.mask_token_id."""
    sha256: str
    """Identity of the vocabulary and its rules."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any added special token."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens are left out and broken UTF-8 is replaced."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0..255 are bytes, 256 ends a document, 257 is the mask."""

    vocab_size: int = 258
    end_of_document_id: int = 256
    mask_token_id: int | None = 257
    sha256: str = hashlib.sha256(b"bytes 0..255, end of document 256, mask 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids below 256; broken UTF-8 is replaced."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library; raises BadInput when it cannot be used."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        if not path.is_file():
            raise BadInput(f"Tokenizer file {path} does not exist: set data.tokenizer to a tokenizer.json.")
        content = path.read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises bare Exception
            raise BadInput(f"Tokenizer file {path} is not a tokenizer.json: {error}.") from error
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        end_of_document_id = _first_id(vocabulary, END_OF_DOCUMENT_NAMES)
        if end_of_document_id is None:
            names = ", ".join(END_OF_DOCUMENT_NAMES)
            raise BadInput(f"Tokenizer file {path} names no end-of-document token: add one of {names}.")
        self.vocab_size: int = max(vocabulary.values()) + 1
        self.end_of_document_id: int = end_of_document_id
        self.mask_token_id: int | None = _first_id(vocabulary, MASK_NAMES)
        self.sha256: str = hashlib.sha256(content).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; the file's post-processor adds nothing."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        return self._tokenizer.decode(ids)


def load_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `bytes`, or the one in the tokenizer.json at this path.

    Raises BadInput when the file is missing, is not a tokenizer.json, or names no end-of-document token.
    """
    return ByteTokenizer() if name == "bytes" else FileTokenizer(Path(name))


def check_vocabulary(name: str, vocab_size: int) -> None:
    """Raise BadInput for a data.tokenizer that cannot be used, or with more ids than model.vocab_size."""
    vocabulary = load_tokenizer(name).vocab_size
    if vocabulary > vocab_size:
        raise BadInput(
            f"data.tokenizer has {vocabulary} ids, more than model.vocab_size={vocab_size}: choose the"
            " model's own tokenizer, or set a larger model.vocab_size."
        )


def _first_id(vocabulary: dict[str, int], names: tuple[str, ...]) -> int | None:
    return next((vocabulary[name] for name in names if name in vocabulary), None)
