"""What the entries of data.path name, and what is known of their files without reading them through.

An entry is the prefix of one .bin/.idx pair, or a folder or a pattern whose pairs, its shards, are one
corpus: their documents count on from one shard to the next, in the order of their names. What a shard holds
is told by the .json that prepared it; of others it is found out once and remembered while their files stay
the same.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.config.ranges import shares_of
from llada_megatron.config.schema import DataConfig
from llada_megatron.data.conversations import holds_conversations, roles_prefix, texts_of
from llada_megatron.data.corpus import CorpusIndex, mapped_lengths, read_index, read_sidecar
from llada_megatron.data.tokenizer import load_tokenizer

MAX_DOCUMENTS = 2**31 - 1
"""Of a corpus: megatron-core numbers them in int32."""
LOOKING_AT_ONCE = 16
_MIB = 2**20
_SAMPLED_MIB = 66  # the first, the last and 64 between


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair."""

    prefix: str
    dtype: str
    documents: int
    tokens: int
    bin_bytes: int
    idx_bytes: int
    bin_sampled_sha256: str
    """Of a .bin above 66 MiB: of 66 evenly spaced MiB."""
    idx_sha256: str
    roles_sampled_sha256: str | None = None
    """Of conversations."""

    def boundary(self, split: str) -> int:
        """Where its validation documents begin: the last ones, whose share is that of data.split."""
        train, validation = shares_of(split)
        boundary = round(self.documents * train / (train + validation))
        return boundary - boundary % (texts_of(self.prefix) if self.roles_sampled_sha256 else 1)

    def documents_of(self, part: str, split: str) -> range:
        """Its documents in a part of the data, `train` or `validation`."""
        boundary = self.boundary(split)
        return range(boundary) if part == "train" else range(boundary, self.documents)


@dataclass(frozen=True)
class Corpus:
    """What one entry of data.path names."""

    entry: str
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        """Documents of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def holds_conversations(self) -> bool:
        """Whether it says whose tokens are whose."""
        return self.shards[0].roles_sampled_sha256 is not None

    def digest(self, name: str) -> str:
        """That of its shard, or one over those of several in their order."""
        digests = [getattr(shard, name) for shard in self.shards]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()

    def place_of(self, document: int) -> tuple[str, int]:
        """Prefix of the shard that holds a document, and the document's number in it."""
        for shard in self.shards:
            if document < shard.documents:
                break
            document -= shard.documents
        return shard.prefix, document

    def documents_of(self, part: str, split: str) -> numpy.ndarray:
        """Numbers of the documents of a part, int32; each shard's own last ones are its validation."""
        parts, first = [], 0
        for shard in self.shards:
            own = shard.documents_of(part, split)
            parts.append(numpy.arange(first + own.start, first + own.stop, dtype=numpy.int32))
            first += shard.documents
        return numpy.concatenate(parts)

    def tokens_of(self, part: str, split: str) -> int:
        """Tokens of a part; the lengths of the smaller one are read."""
        tokens = 0
        for shard in self.shards:
            validation = shard.documents_of("validation", split)
            of_validation = 0
            if 0 < len(validation) < shard.documents:
                lengths = mapped_lengths(shard.prefix, shard.documents)[validation.start :]
                of_validation = int(lengths.sum(dtype=numpy.int64))
            elif validation:
                of_validation = shard.tokens
            tokens += of_validation if part == "validation" else shard.tokens - of_validation
        return tokens

    def lengths(self) -> numpy.ndarray:
        """int32 [documents] of all shards, in tokens."""
        parts = [mapped_lengths(shard.prefix, shard.documents) for shard in self.shards]
        return parts[0] if len(parts) == 1 else numpy.concatenate(parts)

    def index(self) -> CorpusIndex:
        """The index of its only shard, as megatron-core has it; conversations have no other."""
        return read_index(self.shards[0].prefix)


def cache_of(data: DataConfig) -> Path:
    """The folder of what is derived from the corpora."""
    first = data.path[0].rstrip("/").replace("*", "_").replace("?", "_")
    return Path(data.cache_dir or f"{first}.cache")


def prefixes_of(entry: str) -> list[str]:
    """The prefixes that an entry of data.path names; the one it is, where nothing tells otherwise."""
    if os.path.isfile(f"{entry}.idx"):
        return [entry]
    if os.path.isdir(entry):
        pattern = os.path.join(glob.escape(entry), "**", "*.idx")
    elif glob.has_magic(entry):
        pattern = f"{entry}.idx"
    else:
        return [entry]
    found = {path.removesuffix(".idx") for path in glob.glob(pattern, recursive=True)}
    found -= {roles_prefix(prefix) for prefix in found}
    if not found:
        raise BadInput(f"data.path names {entry}, where no .idx lies: name a prefix, a folder or a pattern.")
    return sorted(found)


def domains(entries: Sequence[str]) -> dict[str, str]:
    """A short name for each entry: the last part of its path, without a pattern's signs; or all of it."""
    named = {}
    for entry in entries:
        parts = [re.sub(r"[*?\[\]]+", "", part).strip("_-. ") for part in entry.split("/")]
        named[entry] = next((part for part in reversed(parts) if part), entry)
    counts = Counter(named.values())
    return {entry: name if counts[name] == 1 else entry for entry, name in named.items()}


def survey(data: DataConfig) -> list[Corpus]:
    """The checked corpora of data.path. Raises BadInput for what is missing, damaged or does not fit.

    For one process: the others are told (parallel/ranks.py).
    """
    if not data.path:
        raise BadInput("data.path is empty: name the prefix of at least one .bin/.idx pair.")
    if data.weights and (len(data.weights) != len(data.path) or min(data.weights) <= 0):
        raise BadInput("data.weights must be positive numbers, one per entry of data.path.")
    if data.sequence_length < 1:
        raise BadInput(f"data.sequence_length must be at least 1, not {data.sequence_length}.")
    shares_of(data.split)
    tokenizer = load_tokenizer(data.tokenizer).sha256
    named = {entry: prefixes_of(entry) for entry in data.path}
    cache = cache_of(data)
    with ThreadPoolExecutor(LOOKING_AT_ONCE) as pool:
        shards = {
            entry: tuple(pool.map(lambda prefix: _checked(prefix, tokenizer, cache), prefixes))
            for entry, prefixes in named.items()
        }
    corpora = [
        Corpus(each[0].prefix if len(each) == 1 else entry, each)
        for entry, each in ((entry, shards[entry]) for entry in data.path)
    ]
    for corpus in corpora:
        if corpus.documents > MAX_DOCUMENTS:
            raise BadInput(
                f"data.path names {corpus.entry} with {corpus.documents:,} documents, and a corpus has at"
                f" most {MAX_DOCUMENTS:,}: name its shards in several entries."
            )
        if len(corpus.shards) > 1 and any(shard.roles_sampled_sha256 for shard in corpus.shards):
            raise BadInput(
                f"data.path names {corpus.entry}, several corpora with conversations among them, whose"
                " sequences are packed in memory: name each of them, or prepare them as one."
            )
    return corpora


def sampled_sha256(path: str) -> str:
    """Hash a file whole, or 66 evenly spaced MiB of a larger one."""
    size = os.path.getsize(path)
    if size <= _SAMPLED_MIB * _MIB:
        return whole_sha256(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_SAMPLED_MIB):
            file.seek(number * (size - _MIB) // (_SAMPLED_MIB - 1))
            digest.update(file.read(_MIB))
    return digest.hexdigest()


def whole_sha256(path: str) -> str:
    """Hash a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def described(dtype: str, documents: int, tokens: int, files: Mapping[str, Path]) -> dict[str, Any]:
    """The fields of a shard but its prefix, of its files by their suffixes; its .json keeps them too."""
    said: dict[str, Any] = {"dtype": dtype, "documents": documents, "tokens": tokens}
    said |= {f"{suffix}_bytes": files[suffix].stat().st_size for suffix in ("bin", "idx")}
    said["bin_sampled_sha256"] = sampled_sha256(str(files["bin"]))
    said["idx_sha256"] = whole_sha256(str(files["idx"]))
    if "roles.bin" in files:
        said["roles_sampled_sha256"] = sampled_sha256(str(files["roles.bin"]))
    return said


def _checked(prefix: str, tokenizer_sha256: str, cache: Path) -> Shard:
    sidecar = read_sidecar(prefix)
    shard = _told(prefix, sidecar) or _remembered(prefix, cache) or _looked_at(prefix, cache)
    if sidecar is not None and sidecar["tokenizer_sha256"] != tokenizer_sha256:
        raise BadInput(
            f"{prefix} was prepared with another tokenizer: set data.tokenizer to {sidecar['tokenizer']}."
        )
    return shard


def is_about(prefix: str, suffixes: Sequence[str], sizes: Sequence[int]) -> bool:
    """Whether a corpus's .json was written about the files that lie there, by sizes and times."""
    try:
        written = os.stat(f"{prefix}.json").st_mtime_ns
        found = [os.stat(f"{prefix}.{suffix}") for suffix in suffixes]
    except OSError:
        return False
    same = all(status.st_size == size for status, size in zip(found, sizes, strict=False))
    return same and all(status.st_mtime_ns < written for status in found)


def _shard(prefix: str, content: Any) -> Shard | None:
    """A shard from what was written of it; None where that is damaged."""
    try:
        shard = Shard(prefix, **content)
        counts = (shard.documents, shard.tokens, shard.bin_bytes, shard.idx_bytes)
        digests = (shard.dtype, shard.bin_sampled_sha256, shard.idx_sha256, shard.roles_sampled_sha256 or "")
        numpy.dtype(shard.dtype)
    except TypeError:
        return None
    whole = all(type(count) is int for count in counts) and all(type(each) is str for each in digests)
    return shard if whole else None


def _told(prefix: str, sidecar: dict[str, Any] | None) -> Shard | None:
    """A shard by its .json; None where that says nothing of the files that are there."""
    shard = _shard(prefix, sidecar.get("files")) if sidecar else None
    if shard is None or holds_conversations(prefix) != (shard.roles_sampled_sha256 is not None):
        return None
    suffixes = ("bin", "idx", *(("roles.bin",) if shard.roles_sampled_sha256 else ()))
    return shard if is_about(prefix, suffixes, (shard.bin_bytes, shard.idx_bytes)) else None


def remembered_file(kind: str, prefix: str, cache: Path) -> Path:
    """The file whose name says which .bin, .idx and roles it is about, by size, time and inode."""
    identity = []
    for suffix in ("bin", "idx", "roles.bin", "roles.idx"):
        path = os.path.realpath(f"{prefix}.{suffix}")
        if os.path.isfile(path):
            status = os.stat(path)
            identity.append((path, status.st_size, status.st_mtime_ns, status.st_ino))
    return cache / f"{kind}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:32]}.json"


def remember(path: Path, content: Any) -> None:
    """Write such a file, whole or not at all; where it cannot be written, it will be found out again."""
    aside = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content))
        aside.rename(path)
    except OSError:
        pass


def _remembered(prefix: str, cache: Path) -> Shard | None:
    try:
        return _shard(prefix, json.loads(remembered_file("shard", prefix, cache).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


def _looked_at(prefix: str, cache: Path) -> Shard:
    """Read an index through and hash the files."""
    suffixes = ("bin", "idx", *(("roles.bin",) if holds_conversations(prefix) else ()))
    index = read_index(prefix)
    files = {suffix: Path(f"{prefix}.{suffix}") for suffix in suffixes}
    said = described(index.dtype.name, len(index.document_lengths), index.tokens, files)
    remember(remembered_file("shard", prefix, cache), said)
    return Shard(prefix, **said)
