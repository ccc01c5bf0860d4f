"""Token files to packed sequences: documents, cut at L, in one global order that a seed fixes.

    index i --> (blend: member m, its index j) --> epoch e, position p = divmod(j, N)
            --> permutation of (seed, e) --> GPTDataset's shuffle --> L tokens and their documents

The documents of a split are shuffled once and laid end to end; every L tokens are one sequence and the
tail of fewer than L is left out. A document cut at L continues in another sequence as a piece of its own:
that piece does not see its beginning. Pieces come from the .idx, not from end-of-document tokens, so
corpora without such tokens work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schema import DataConfig
from llada_megatron.data.blend import Blend
from llada_megatron.data.conversations import (
    ANSWER,
    PackedConversations,
    holds_conversations,
    texts_of,
)
from llada_megatron.data.index_cache import filled, loaded
from llada_megatron.data.packing import permutation
from llada_megatron.data.reading import TokenFiles
from llada_megatron.data.shards import Corpus, cache_of, domains, prefixes_of, survey
from llada_megatron.data.token_ids import check_ids
from llada_megatron.parallel.ranks import from_first_rank, warn

SPLITS = {"train": Split.train, "validation": Split.valid}
INDICES = ("document_index", "sample_index", "shuffle_index")


@dataclass(frozen=True, eq=False)
class PackedSample:
    """One clean sequence and the pieces of documents in it."""

    tokens: numpy.ndarray
    """int64 [L]."""
    cu_seqlens: numpy.ndarray
    """int32 [pieces + 1]: where each piece starts, from 0, and L."""
    corpus: str = ""
    """The entry of data.path that it comes from."""
    document_ids: numpy.ndarray | None = None
    """int [pieces]: number of each piece's document in its corpus, -1 for padding."""
    supervised: numpy.ndarray | None = None
    """bool [L]: the tokens that may be masked and predicted; None for all of them (plain text)."""
    is_left_out: bool = False
    """Whether nothing may be learnt from it: it supervises no position and counts for nothing."""
    place_of: Callable[[int], tuple[str, int]] | None = None
    """Prefix and number of a document in its files, where the corpus has several shards."""

    def document_at(self, position: int) -> str:
        """The file and document of a token, for people."""
        if self.document_ids is None:
            return "A sample"
        piece = numpy.searchsorted(self.cu_seqlens, position, side="right") - 1
        prefix, document = self.corpus, int(self.document_ids[piece])
        if self.place_of is not None:
            prefix, document = self.place_of(document)
        return f"{prefix}: document {document} (counted from 0)"


class BadSample(BadInput):
    """A sample that cannot be trained on."""

    def __init__(self, sentence: str, sample: PackedSample | None = None) -> None:
        super().__init__(sentence)
        self.sample = sample


class PackedDocuments:
    """The sequences of one corpus and split: endless, each epoch in an order of its own."""

    def __init__(self, corpus: Corpus, indices: Path, seed: int) -> None:
        """indices: the folder of megatron-core's indices of the split."""
        self._seed = seed
        self.document_index, self.sample_index, self.shuffle_index = (
            loaded(indices, part) for part in INDICES
        )
        self._tokens = TokenFiles([(each.prefix, each.dtype, each.documents) for each in corpus.shards])
        self._order: tuple[int, numpy.ndarray] = (0, numpy.empty(0, numpy.int64))

    @property
    def sequences_per_epoch(self) -> int:
        """N: sequences of L tokens in the split."""
        return self.sample_index.shape[0] - 1

    def __getitem__(self, index: int) -> dict[str, numpy.ndarray]:
        """Return tokens [L], cu_seqlens [pieces + 1] and document_ids [pieces] of an index >= 0."""
        epoch, position = divmod(int(index), self.sequences_per_epoch)
        if epoch > 0:
            position = int(self._permutation(epoch)[position])
        place = int(self.shuffle_index[position])
        # A sequence begins in the document at place `first` of the order, at one of its tokens.
        (first, begin), (last, end) = self.sample_index[place : place + 2].tolist()
        documents = self.document_index[first : last + 1].tolist()
        pieces: list[tuple[int, int, int | None]] = [(document, 0, None) for document in documents]
        pieces[-1] = (documents[-1], 0, end)
        pieces[0] = (documents[0], begin, end - begin if first == last else None)
        parts = self._tokens.read(pieces)
        lengths = numpy.array([len(part) for part in parts])
        # A sequence that starts where a document ends lists that document with no tokens.
        occupied = numpy.flatnonzero(lengths)
        ends = numpy.cumsum(lengths[occupied])
        return {
            "tokens": numpy.concatenate(parts, dtype=numpy.int64),
            "cu_seqlens": numpy.concatenate(([0], ends)).astype(numpy.int32),
            "document_ids": numpy.array(documents, numpy.int64)[occupied],
        }

    def _permutation(self, epoch: int) -> numpy.ndarray:
        """Return the order of an epoch after the first, a function of (seed, epoch) alone."""
        known, order = self._order  # taken at once: several threads may read
        if known != epoch:
            order = permutation(self._seed, epoch, self.sequences_per_epoch)
            self._order = epoch, order
        return order


Member = PackedDocuments | PackedConversations
"""The sequences of one corpus and split."""


class PackedSequences:
    """Packed sequences by global sample index: `sequences[i]` for any i >= 0 is a `PackedSample`.

    The sample at i is a function of (data, seed, i). Raises BadSample for a sequence that contains the
    mask token, IndexError for i < 0.
    """

    def __init__(
        self, corpora: list[Corpus], members: list[Member], blend: Blend | None, mask_token_id: int
    ) -> None:
        self.corpora, self.members, self.blend = corpora, members, blend
        self._mask_token_id = mask_token_id
        self._ahead: dict[int, Future[PackedSample]] = {}
        self._reader = ThreadPoolExecutor(1, "read ahead")

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in one epoch of every corpus."""
        return sum(member.sequences_per_epoch for member in self.members)

    def announce(self, indices: Iterable[int]) -> None:
        """Let a thread read these sequences, in their order, and keep them until others are announced."""
        wanted = dict.fromkeys(indices)
        for index in self._ahead.keys() - wanted.keys():
            self._ahead.pop(index).cancel()
        for index in wanted:
            if index not in self._ahead:
                self._ahead[index] = self._reader.submit(self._read, index)

    def __getitem__(self, index: int) -> PackedSample:
        """Return the sample at a global index >= 0."""
        if index < 0:
            raise IndexError(f"There is no sequence {index}.")
        ahead = self._ahead.get(index)
        return self._read(index) if ahead is None else ahead.result()

    def _read(self, index: int) -> PackedSample:
        number, own = (0, index) if self.blend is None else self.blend[index]
        drawn, corpus = self.members[number][own], self.corpora[number]
        sample = PackedSample(
            drawn["tokens"],
            drawn["cu_seqlens"],
            corpus.entry,
            drawn["document_ids"],
            supervised=drawn["roles"] >= ANSWER if "roles" in drawn else None,
            place_of=corpus.place_of,
        )
        masked = numpy.flatnonzero(sample.tokens == self._mask_token_id)
        if masked.size:
            raise BadSample(
                f"{sample.document_at(masked[0])} contains the mask token {self._mask_token_id}: remove it"
                " from the corpus, change model.mask_token_id, or set training.bad_samples=skip.",
                sample,
            )
        return sample


def held_out(data: DataConfig) -> dict[str, DataConfig]:
    """By domain, the data whose `validation` split is held out: all of each entry of data.validation.

    Without any the tails of data.path, under no name.
    """
    if not data.validation:
        return {"": data}
    own = replace(data, validation=[], weights=[], split="0,1", cache_dir=str(cache_of(data)))
    names = domains(data.validation)
    return {names[entry]: replace(own, path=[entry]) for entry in data.validation}


def build_sequences(
    data: DataConfig,
    *,
    split: str,
    seed: int,
    vocab_size: int,
    mask_token_id: int,
    refuse_ids: bool = True,
) -> PackedSequences:
    """Build the sequences of `split` ("train" or "validation"), or load their indices from the cache.

    Every process of an initialised torch.distributed group must call this; rank 0 looks at the files and
    builds, the others are told and load. Raises BadInput, on every rank alike, for files that cannot be used,
    for ids outside 0..vocab_size - 1 and mask tokens anywhere in them, for settings that do not fit together
    and for a split below one sequence. Without `refuse_ids` such ids are left to their readers.
    """
    if not 0 <= seed < 2**32:
        raise BadInput(f"run.seed must be from 0 to 2**32 - 1, not {seed}.")
    corpora, weights = from_first_rank(_corpora_of, data, split)
    if refuse_ids:
        check_ids(corpora, vocab_size, mask_token_id, cache_of(data))
    folders = from_first_rank(_indices, data, corpora, split, seed)
    members: list[Member] = [
        PackedDocuments(corpus, folder, seed)
        if folder
        else PackedConversations(corpus.index(), corpus.documents_of(split, data.split), data, seed)
        for corpus, folder in zip(corpora, folders, strict=True)
    ]
    names = [corpus.entry for corpus in corpora]
    return PackedSequences(corpora, members, Blend(names, weights) if len(names) > 1 else None, mask_token_id)


def check_split(data: DataConfig, split: str) -> None:
    """Raise BadInput for what `build_sequences` would refuse before it builds an index."""
    _corpora_of(data, split)


def refuse_pairs(data: DataConfig, objectives: Iterable[str]) -> None:
    """Raise BadInput for a corpus of preferences where an objective would learn the rejected answers."""
    learners = [name for name in objectives if not OBJECTIVES[name].pairs]
    prefixes = [prefix for entry in data.path for prefix in prefixes_of(entry)] if learners else []
    for prefix in prefixes:
        if holds_conversations(prefix) and texts_of(prefix) == 2:
            raise BadInput(
                f"{prefix} holds pairs of answers, and objective {learners[0]} would learn the rejected ones"
                " too: name a corpus of chats or documents."
            )


def _corpora_of(data: DataConfig, split: str) -> tuple[list[Corpus], list[float]]:
    """The checked corpora that have sequences in a split, and their weights in the blend."""
    corpora = survey(data)
    tokens = [corpus.tokens_of(split, data.split) for corpus in corpora]
    weights = [float(weight) for weight in data.weights or tokens]
    kept, short = [], []
    for number, corpus in enumerate(corpora):
        if tokens[number] >= (1 if corpus.holds_conversations else data.sequence_length):
            kept.append(number)
        else:
            documents = len(corpus.documents_of(split, data.split))
            short.append(
                f"{corpus.entry}: the {split} split holds {documents} of {corpus.documents} documents and"
                f" {tokens[number]} tokens, less than one sequence"
            )
    if short and (split == "train" or not kept):
        instead = ", or name held-out text in data.validation" if split == "validation" else ""
        raise BadInput(
            f"{short[0]}: change data.split ({data.split}) or data.sequence_length"
            f" ({data.sequence_length}){instead}."
        )
    for sentence in short:
        warn(f"{sentence}: it is left out of evaluations")
    return [corpora[number] for number in kept], [weights[number] for number in kept]


def _indices(data: DataConfig, corpora: list[Corpus], split: str, seed: int) -> list[Path | None]:
    """The folder of each corpus's indices, built where it is not there; None for conversations."""
    return [
        None if corpus.holds_conversations else _folder_of(data, corpus, split, seed) for corpus in corpora
    ]


def _folder_of(data: DataConfig, corpus: Corpus, split: str, seed: int) -> Path:
    identity = {
        "prefix": corpus.entry,
        "index": corpus.digest("idx_sha256"),
        "seed": seed,
        "sequence_length": data.sequence_length,
        "shares": data.split,
        "split": split,
    }

    def build(folder: Path) -> None:
        config = _megatron_config(data, corpus.entry, seed, folder)
        documents = SimpleNamespace(sequence_lengths=corpus.lengths(), path_prefix=corpus.entry)
        numbers = corpus.documents_of(split, data.split)
        GPTDataset(documents, corpus.entry, numbers, None, SPLITS[split], config)

    return filled(cache_of(data), identity, INDICES, build)


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
