"""Text to token ids and back: bytes, or a tokenizer.json of the user's."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Protocol

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
MASK_NAMES = ("<|mask|>", "<|MASK|>", "<|mdm_mask|>", "[MASK]", "<mask>")


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    vocab_size: int
    """One more than the largest id."""
    end_of_document: str | None
    """The token that ends a document, by name; None where a file names none."""
    end_of_document_id: int | None
    """None where a file names no such token: only preparing a corpus needs one."""
    mask_token_id: int | None
    """None when the vocabulary names no mask token; a run then names it in model.mask_token_id."""
    unknown_token_id: int | None
    """What stands for text outside the vocabulary; None where there is no such token."""
    sha256: str
    """Identity of the vocabulary and its rules."""
    notes: tuple[str, ...]
    """Settings of the file that are not followed, as phrases."""

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the ids of a text, without any added special token.

        A special token's name in the text (`<|endoftext|>`) is text like any other; with `parse_special` it
        becomes that token.
        """
        ...

    def special_strings(self, text: str) -> int:
        """Return how often names of special tokens stand in a text."""
        ...

    def defused(self, text: str, mark: str) -> str:
        """Return the text with `mark` after the first character of each name of a special token in it."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens are left out and broken UTF-8 is replaced."""
        ...


class ByteTokenizer:
    """UTF-8 bytes: ids 0..255 are bytes, 256 ends a document, 257 is the mask."""

    vocab_size: int = 258
    end_of_document: str | None = END_OF_DOCUMENT_NAMES[0]
    end_of_document_id: int | None = 256
    mask_token_id: int | None = 257
    unknown_token_id: int | None = None
    sha256: str = hashlib.sha256(b"bytes 0..255, end of document 256, mask 257").hexdigest()
    notes: tuple[str, ...] = ()

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the UTF-8 bytes of a text; with `parse_special` the name of the end of a document is that
        id.
        """
        if not parse_special:
            return list(text.encode())
        first, *others = (list(part.encode()) for part in text.split(END_OF_DOCUMENT_NAMES[0]))
        return first + [token for part in others for token in (256, *part)]

    def special_strings(self, text: str) -> int:
        """Return how often the name of the end of a document stands in a text."""
        return text.count(END_OF_DOCUMENT_NAMES[0])

    def defused(self, text: str, mark: str) -> str:
        """Return the text with the mark inside each such name."""
        name = END_OF_DOCUMENT_NAMES[0]
        return text.replace(name, name[0] + mark + name[1:])

    def decode(self, ids: list[int]) -> str:
        """Return the text of the ids below 256; broken UTF-8 is replaced."""
        return bytes(token for token in ids if token < 256).decode(errors="replace")


class FileTokenizer:
    """A tokenizer.json of the `tokenizers` library; raises BadInput when it cannot be used.

    What such a file asks for beside its vocabulary and rules was set for another use (batches of an encoder,
    training with dropout): it is switched off, and `notes` says so.
    """

    def __init__(self, path: Path, end_of_document: str | None) -> None:
        if not path.is_file():
            raise BadInput(f"Tokenizer file {path} does not exist: set data.tokenizer to a tokenizer.json.")
        content = path.read_bytes()
        self._path, self._tokenizer = path, _read(content, path)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise BadInput(f"Tokenizer file {path} has an empty vocabulary: choose another.")
        if end_of_document is not None and end_of_document not in vocabulary:
            raise BadInput(f"{path} has no token {end_of_document!r}: choose another --end-of-document.")
        self.end_of_document = end_of_document or _first_name(vocabulary, END_OF_DOCUMENT_NAMES)
        mask_token = _first_name(vocabulary, MASK_NAMES)
        self.vocab_size: int = max(vocabulary.values()) + 1
        if self.vocab_size > 2**31:
            raise BadInput(f"Tokenizer file {path} has an id above 2**31 - 1, which no token file holds.")
        self.end_of_document_id = vocabulary.get(self.end_of_document or "")
        self.mask_token_id = vocabulary.get(mask_token or "")
        # Unigram has no name for it; its text outside the vocabulary goes uncounted.
        self.unknown_token_id = vocabulary.get(getattr(self._tokenizer.model, "unk_token", None) or "")
        self.sha256: str = hashlib.sha256(content).hexdigest()
        self.notes = _switch_off(self._tokenizer)
        special = {
            token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special
        }
        special |= {name for name in (self.end_of_document, mask_token) if name}
        names = sorted(filter(None, special), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the ids of a text; the file's post-processor adds nothing.

        Raises BadInput for a text that the file's rules cannot express, as with an unknown token it lacks.
        """
        self._tokenizer.encode_special_tokens = not parse_special
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises bare Exception
            raise BadInput(f"Tokenizer file {self._path} cannot encode a text: {error}.") from None

    def special_strings(self, text: str) -> int:
        """Return how often names of special tokens, the mask's and the end's too, stand in a text."""
        return len(self._special.findall(text)) if self._special else 0

    def defused(self, text: str, mark: str) -> str:
        """Return the text with `mark` after the first character of each such name."""
        return (
            self._special.sub(lambda name: name[0][0] + mark + name[0][1:], text) if self._special else text
        )

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids; special tokens are left out."""
        return self._tokenizer.decode(ids)


def load_tokenizer(name: str, end_of_document: str | None = None) -> Tokenizer:
    """Return the tokenizer called `bytes`, or the one in the tokenizer.json at this path.

    end_of_document: the token that ends a document, where it is none of `END_OF_DOCUMENT_NAMES`. Raises
    BadInput when the file is missing, is not a tokenizer.json, or has no such token.
    """
    if name != "bytes":
        return FileTokenizer(Path(name), end_of_document)
    if end_of_document is not None:
        raise BadInput("--end-of-document belongs to a tokenizer.json: bytes end a document with id 256.")
    return ByteTokenizer()


def check_vocabulary(name: str, vocab_size: int) -> None:
    """Raise BadInput for a data.tokenizer that cannot be used, or with more ids than model.vocab_size."""
    vocabulary = load_tokenizer(name).vocab_size
    if vocabulary > vocab_size:
        raise BadInput(
            f"data.tokenizer has {vocabulary} ids, more than model.vocab_size={vocab_size}: choose the"
            " model's own tokenizer, or set a larger model.vocab_size."
        )


def _read(content: bytes, path: Path) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:  # the library raises bare Exception; where it panics, not even that
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadInput(f"Tokenizer file {path} is not a tokenizer.json: {error}.") from error


def _switch_off(tokenizer: Any) -> tuple[str, ...]:
    """Switch off what would change or add to the ids of a text, and return it as phrases."""
    notes = []
    if tokenizer.truncation:
        notes.append(f"its truncation at {tokenizer.truncation['max_length']} tokens is switched off")
        tokenizer.no_truncation()
    if tokenizer.padding:
        length = tokenizer.padding["length"]
        notes.append(f"its padding{f' to {length} tokens' if length else ''} is switched off")
        tokenizer.no_padding()
    if dropout := getattr(tokenizer.model, "dropout", None):
        notes.append(f"its dropout of merges ({dropout}) is switched off")
        tokenizer.model.dropout = None
    if added := tokenizer.num_special_tokens_to_add(False):
        notes.append(f"its post-processor's {added} special token{'s' * (added > 1)} a text are left out")
    return tuple(notes)


def _first_name(vocabulary: dict[str, int], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in vocabulary), None)
