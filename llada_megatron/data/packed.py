"""Token files to packed sequences: documents, cut at L, in one global order that a seed fixes.

    index i --> (blend: member m, its index j) --> epoch e, position p = divmod(j, N)
            --> permutation of (seed, e) --> GPTDataset's shuffle --> L tokens and their documents

The documents of a split are shuffled once and laid end to end; every L tokens are one sequence and the
tail of fewer than L is left out. A document cut at L continues in another sequence as a piece of its own:
that piece does not see its beginning. Pieces come from the .idx, not from end-of-document tokens, so
corpora without such tokens work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.ranges import shares_of
from llada_megatron.config.schema import DataConfig, EvaluationConfig
from llada_megatron.data.conversations import (
    ANSWER,
    PackedConversations,
    holds_conversations,
    roles_prefix,
    texts_of,
)
from llada_megatron.data.corpus import CorpusIndex, read_index, read_sidecar
from llada_megatron.data.index_cache import cached
from llada_megatron.data.token_ids import check_ids
from llada_megatron.data.tokenizer import load_tokenizer

SPLITS = {"train": Split.train, "validation": Split.valid}
_MIB = 2**20
_SAMPLED_MIB = 66  # the first, the last and 64 between


@dataclass(frozen=True, eq=False)
class PackedSample:
    """One clean sequence and the pieces of documents in it."""

    tokens: numpy.ndarray
    """int64 [L]."""
    cu_seqlens: numpy.ndarray
    """int32 [pieces + 1]: where each piece starts, from 0, and L."""
    corpus: str = ""
    """Prefix of the files that it comes from."""
    document_ids: numpy.ndarray | None = None
    """int [pieces]: number of each piece's document in its corpus, -1 for padding."""
    supervised: numpy.ndarray | None = None
    """bool [L]: the tokens that may be masked and predicted; None for all of them (plain text)."""
    is_left_out: bool = False
    """Whether nothing may be learnt from it: it supervises no position and counts for nothing."""

    def document_at(self, position: int) -> str:
        """The file and document of a token, for people."""
        if self.document_ids is None:
            return "A sample"
        piece = numpy.searchsorted(self.cu_seqlens, position, side="right") - 1
        return f"{self.corpus}: document {self.document_ids[piece]} (counted from 0)"


class BadSample(BadInput):
    """A sample that cannot be trained on."""

    def __init__(self, sentence: str, sample: PackedSample | None = None) -> None:
        super().__init__(sentence)
        self.sample = sample


class PackedDocuments(GPTDataset):
    """The sequences of one corpus and split: endless, each epoch in an order of its own."""

    @property
    def sequences_per_epoch(self) -> int:
        """N: sequences of L tokens in the split."""
        return self.sample_index.shape[0] - 1

    def __len__(self) -> int:
        """Return more than any blend asks for: members start their next epoch by themselves."""
        return 2**62

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        """Return tokens [L], cu_seqlens [pieces + 1] and document_ids [pieces] of an index >= 0."""
        epoch, position = divmod(int(index), self.sequences_per_epoch)
        if epoch > 0:
            position = int(self._permutation(epoch)[position])
        tokens, document_ids, lengths = self._query_document_sample_shuffle_indices(position)
        # A sequence that starts where a document ends lists that document with no tokens.
        occupied = numpy.flatnonzero(lengths)
        ends = numpy.cumsum(numpy.asarray(lengths)[occupied])
        return {
            "tokens": tokens,
            "cu_seqlens": numpy.concatenate(([0], ends)).astype(numpy.int32),
            "document_ids": document_ids[occupied],
        }

    def _permutation(self, epoch: int) -> numpy.ndarray:
        """Return the order of an epoch after the first, a function of (seed, epoch) alone."""
        if getattr(self, "_permuted_epoch", None) != epoch:
            # Raw bits and a stable sort: numpy promises the same bits in every version, but not the same
            # `Generator.permutation`.
            key = numpy.array([self.config.random_seed, epoch], dtype=numpy.uint64)
            bits = numpy.random.Philox(key=key).random_raw(self.sequences_per_epoch)
            self._order, self._permuted_epoch = numpy.argsort(bits, kind="stable"), epoch
        return self._order


Member = PackedDocuments | PackedConversations
"""The sequences of one corpus and split."""


class PackedSequences:
    """Packed sequences by global sample index: `sequences[i]` for any i >= 0 is a `PackedSample`.

    The sample at i is a function of (data, seed, i). Raises BadSample for a sequence that contains the
    mask token, IndexError for i < 0 and, in a blend, for i past the sequences it was built for.
    """

    def __init__(self, members: list[Member], blend: BlendedDataset | None, mask_token_id: int) -> None:
        self.members = members
        self.blend = blend
        self._mask_token_id = mask_token_id

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in one epoch of every corpus."""
        return sum(member.sequences_per_epoch for member in self.members)

    def __getitem__(self, index: int) -> PackedSample:
        """Return the sample at a global index >= 0."""
        if index < 0 or (self.blend is not None and index >= len(self.blend)):
            raise IndexError(f"There is no sequence {index}: build with a larger sequences_wanted.")
        drawn = self.members[0][index] if self.blend is None else self.blend[index]
        prefix = self.members[int(drawn.get("dataset_id", 0))].dataset_path
        supervised = drawn["roles"] >= ANSWER if "roles" in drawn else None
        sample = PackedSample(
            drawn["tokens"], drawn["cu_seqlens"], prefix, drawn["document_ids"], supervised=supervised
        )
        masked = numpy.flatnonzero(sample.tokens == self._mask_token_id)
        if masked.size:
            raise BadSample(
                f"{sample.document_at(masked[0])} contains the mask token {self._mask_token_id}: remove it"
                " from the corpus, change model.mask_token_id, or set training.bad_samples=skip.",
                sample,
            )
        return sample


class _AnyMember:
    """A member of any kind, to a blend that wants them all of one class."""

    index_split = Split.train  # the blend compares them; our members know their split

    def __init__(self, member: Member) -> None:
        self.member = member
        self.unique_identifiers = {"description": member.unique_description}

    def __len__(self) -> int:
        return len(self.member)

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        return self.member[index]


BASELINE_SEQUENCES = 4096
"""The entropies of the text are taken over at most this many held-out sequences."""


def held_out_sequences(evaluation: EvaluationConfig) -> int:
    """How many sequences of the validation split an evaluation reads, for the model and for the entropies."""
    return max(evaluation.sequences, BASELINE_SEQUENCES)


def build_sequences(
    data: DataConfig,
    *,
    split: str,
    seed: int,
    vocab_size: int,
    mask_token_id: int,
    sequences_wanted: int,
    refuse_ids: bool = True,
) -> PackedSequences:
    """Build the sequences of `split` ("train" or "validation"), or load their indices from the cache.

    `sequences_wanted` bounds the index of a blend and changes no sample. Every process of an initialised
    torch.distributed group must call this; rank 0 builds before the others load. Raises BadInput for files
    that cannot be used, for ids outside 0..vocab_size - 1 anywhere in them, for settings that do not fit
    together and for a split below one sequence. Without `refuse_ids` such ids are left to their readers.
    """
    if not 0 <= seed < 2**32:
        raise BadInput(f"run.seed must be from 0 to 2**32 - 1, not {seed}.")
    corpora = _check(data)
    documents = [_documents_of(corpus, data, split) for corpus in corpora]
    for corpus in corpora if refuse_ids else []:
        check_ids(corpus, vocab_size, _cache(data))
    members = [
        _build_member(data, corpus, numbers, split, seed)
        for corpus, numbers in zip(corpora, documents, strict=True)
    ]
    blend = None
    if len(members) > 1:
        weights = [float(weight) for weight in data.weights] or [
            float(corpus.document_lengths[numbers].sum(dtype=numpy.int64))
            for corpus, numbers in zip(corpora, documents, strict=True)
        ]
        blend = _build_blend(data, members, weights, sequences_wanted)
    return PackedSequences(members, blend, mask_token_id)


def check_split(data: DataConfig, split: str) -> None:
    """Raise BadInput for what `build_sequences` would refuse before it builds an index."""
    for corpus in _check(data):
        _documents_of(corpus, data, split)


def refuse_pairs(data: DataConfig, objectives: Iterable[str]) -> None:
    """Raise BadInput for a corpus of preferences where an objective would learn the rejected answers."""
    for objective in objectives:
        if OBJECTIVES[objective].pairs:
            continue
        for prefix in data.path:
            if holds_conversations(prefix) and texts_of(prefix) == 2:
                raise BadInput(
                    f"{prefix} holds pairs of answers, and objective {objective} would learn the rejected"
                    " ones too: name a corpus of chats or documents."
                )


def _check(data: DataConfig) -> list[CorpusIndex]:
    """Return the checked corpora; every process finds the same fault before any of them waits."""
    if not data.path:
        raise BadInput("data.path is empty: name the prefix of at least one .bin/.idx pair.")
    if data.weights and (len(data.weights) != len(data.path) or min(data.weights) <= 0):
        raise BadInput("data.weights must be positive numbers, one per entry of data.path.")
    if data.sequence_length < 1:
        raise BadInput(f"data.sequence_length must be at least 1, not {data.sequence_length}.")
    shares_of(data.split)
    corpora = [read_index(prefix) for prefix in data.path]
    tokenizer = load_tokenizer(data.tokenizer)
    for prefix in data.path:
        sidecar = read_sidecar(prefix)
        if sidecar is not None and sidecar["tokenizer_sha256"] != tokenizer.sha256:
            raise BadInput(
                f"{prefix} was prepared with another tokenizer: set data.tokenizer to {sidecar['tokenizer']}."
            )
    return corpora


def _megatron_config(data: DataConfig, prefix: str, seed: int, directory: Path) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=data.sequence_length,
        blend=([prefix], None),
        split=data.split,
        path_to_cache=str(directory),
        # The dataset never tokenizes; megatron-core asks this object for its size and its identity only.
        tokenizer=SimpleNamespace(vocab_size=None, unique_identifiers={}),
        add_extra_token_to_sequence=False,
        create_attention_mask=False,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )


def _documents_of(corpus: CorpusIndex, data: DataConfig, split: str) -> numpy.ndarray:
    """Return the document numbers of a split, int32 [documents of the split]."""
    train, validation = shares_of(data.split)
    documents = len(corpus.document_lengths)
    boundary = round(documents * train / (train + validation))
    if holds_conversations(corpus.prefix):
        boundary -= boundary % texts_of(corpus.prefix)
    first, last = (0, boundary) if split == "train" else (boundary, documents)
    tokens = int(corpus.document_lengths[first:last].sum(dtype=numpy.int64))
    if tokens < (1 if holds_conversations(corpus.prefix) else data.sequence_length):
        raise BadInput(
            f"{corpus.prefix}: the {split} split holds {last - first} of {documents} documents and {tokens} "
            f"tokens, less than one sequence: change data.split ({data.split}) or data.sequence_length "
            f"({data.sequence_length})."
        )
    return numpy.arange(first, last, dtype=numpy.int32)


def _build_member(
    data: DataConfig, corpus: CorpusIndex, documents: numpy.ndarray, split: str, seed: int
) -> Member:
    if holds_conversations(corpus.prefix):
        return PackedConversations(corpus, documents, data, seed)
    identity = {
        "prefix": corpus.prefix,
        "index": _sampled_sha256(f"{corpus.prefix}.idx"),
        "seed": seed,
        "sequence_length": data.sequence_length,
        "shares": data.split,
        "split": split,
    }

    def build(directory: Path) -> PackedDocuments:
        config = _megatron_config(data, corpus.prefix, seed, directory)
        dataset = IndexedDataset(corpus.prefix)
        return PackedDocuments(dataset, corpus.prefix, documents, None, SPLITS[split], config)

    return cached(_cache(data), identity, ("document_index", "sample_index", "shuffle_index"), build)


def _build_blend(
    data: DataConfig, members: list[Member], weights: list[float], sequences_wanted: int
) -> BlendedDataset:
    # The greedy blend of a larger size begins with that of a smaller one; powers of two let runs of about
    # the same length share one index.
    size = 1 << max(sequences_wanted - 1, 0).bit_length()
    identity = {
        "members": [member.unique_description for member in members],
        "weights": weights,
        "size": size,
    }

    def build(directory: Path) -> BlendedDataset:
        config = _megatron_config(data, data.path[0], 0, directory)
        alike = all(isinstance(member, PackedDocuments) for member in members)
        return BlendedDataset(members if alike else [*map(_AnyMember, members)], weights, size, config)

    return cached(_cache(data), identity, ("dataset_index", "dataset_sample_index"), build)


def _cache(data: DataConfig) -> Path:
    return Path(data.cache_dir or f"{data.path[0]}.cache")


def fingerprint(data: DataConfig) -> dict[str, Any]:
    """Return what a resume compares: sizes and hashes of the files and the settings that order them.

    The .idx is hashed whole; of a .bin above 66 MiB the first, the last and 64 evenly spaced MiB are. Paths
    take no part, so a corpus may be moved. The result is plain JSON data.
    """
    return {
        "corpora": [
            {
                "bin_bytes": os.path.getsize(f"{corpus.prefix}.bin"),
                "idx_bytes": os.path.getsize(f"{corpus.prefix}.idx"),
                "bin_sampled_sha256": _sampled_sha256(f"{corpus.prefix}.bin"),
                "idx_sha256": _sha256(f"{corpus.prefix}.idx"),
                **_roles_fingerprint(corpus.prefix),
            }
            for corpus in _check(data)
        ],
        "weights": [float(weight) for weight in data.weights],
        "split": data.split,
        "sequence_length": data.sequence_length,
        "tokenizer_sha256": load_tokenizer(data.tokenizer).sha256,
    }


def _roles_fingerprint(prefix: str) -> dict[str, Any]:
    if not holds_conversations(prefix):
        return {}
    return {"roles_sampled_sha256": _sampled_sha256(f"{roles_prefix(prefix)}.bin")}


def fingerprint_difference(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one sentence per difference between two fingerprints; empty when the data are the same."""
    sentences = []
    if len(saved["corpora"]) != len(now["corpora"]):
        sentences.append(f"data.path had {len(saved['corpora'])} corpora and has {len(now['corpora'])} now.")
    for number, (before, after) in enumerate(zip(saved["corpora"], now["corpora"], strict=False)):
        name = f"data.path[{number}]"
        for suffix, digest in (("bin", "bin_sampled_sha256"), ("idx", "idx_sha256")):
            size = f"{suffix}_bytes"
            if before[size] != after[size]:
                sentences.append(
                    f"The .{suffix} of {name} had {before[size]} bytes and has {after[size]} now."
                )
            elif before[digest] != after[digest]:
                sentences.append(f"The .{suffix} of {name} has the same size and other content.")
        if before.get("roles_sampled_sha256") != after.get("roles_sampled_sha256"):
            sentences.append(f"The roles of {name} are others now.")
    for setting in ("weights", "split", "sequence_length"):
        if saved[setting] != now[setting]:
            sentences.append(f"data.{setting} was {saved[setting]} and is {now[setting]} now.")
    if saved["tokenizer_sha256"] != now["tokenizer_sha256"]:
        sentences.append("data.tokenizer is another tokenizer now.")
    return sentences


def _sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sampled_sha256(path: str) -> str:
    """Hash a file whole, or 66 evenly spaced MiB of a larger one."""
    size = os.path.getsize(path)
    if size <= _SAMPLED_MIB * _MIB:
        return _sha256(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for number in range(_SAMPLED_MIB):
            file.seek(number * (size - _MIB) // (_SAMPLED_MIB - 1))
            digest.update(file.read(_MIB))
    return digest.hexdigest()
