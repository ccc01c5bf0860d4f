"""Token files to packed sequences in one global order that a seed fixes.

    index i --> (blend: corpus, its index j) --> sequence j of the corpus (readings.py)
            --> L tokens and their documents (laid_out.py, conversations.py)

A document cut at L continues in another sequence as a piece of its own: that piece does not see its
beginning. Pieces come from the .idx, not from end-of-document tokens, so corpora without such tokens work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.config.objectives import OBJECTIVES
from llada_megatron.config.schema import DataConfig
from llada_megatron.data.blend import Blend
from llada_megatron.data.conversations import ANSWER, holds_conversations, texts_of
from llada_megatron.data.readings import Places, Read, Reading, conversations, opened, places_of
from llada_megatron.data.shards import Corpus, cache_of, domains, prefixes_of, survey
from llada_megatron.data.token_ids import check_ids
from llada_megatron.parallel.ranks import from_first_rank, warn


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


class PackedSequences:
    """Packed sequences by global index: `sequences[i]` for any i >= first is a `PackedSample`.

    The sample at i is a function of (data, seed, i), and of what was read before the first. Raises BadSample
    for a sequence that contains the mask token, IndexError for i < first.
    """

    def __init__(
        self,
        corpora: list[Corpus],
        readings: Sequence[Reading],
        blend: Blend | None,
        mask_token_id: int,
        *,
        first: int = 0,
        begins: Sequence[int] = (),
    ) -> None:
        """begins: how many sequences of each reading come before the first, none by default."""
        self.corpora, self.readings, self.blend, self.first = corpora, readings, blend, first
        self._begins = begins or [0] * len(corpora)
        self._mask_token_id = mask_token_id
        self._ahead: dict[int, Future[PackedSample]] = {}
        self._reader = ThreadPoolExecutor(1, "read ahead")

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences in one epoch of every corpus."""
        return sum(reading.sequences_per_epoch for reading in self.readings)

    def announce(self, indices: Iterable[int]) -> None:
        """Let a thread read these sequences, in their order, and keep them until others are announced."""
        wanted = dict.fromkeys(indices)
        for index in self._ahead.keys() - wanted.keys():
            self._ahead.pop(index).cancel()
        for index in wanted:
            if index not in self._ahead:
                self._ahead[index] = self._reader.submit(self._read, index)

    def __getitem__(self, index: int) -> PackedSample:
        """Return the sample at a global index >= first."""
        if index < self.first:
            raise IndexError(f"There is no sequence {index}.")
        ahead = self._ahead.get(index)
        return self._read(index) if ahead is None else ahead.result()

    def _read(self, index: int) -> PackedSample:
        place = index - self.first
        number, own = (0, place) if self.blend is None else self.blend[place]
        drawn, corpus = self.readings[number][self._begins[number] + own], self.corpora[number]
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
    corpora, blend = mixture(data, split)
    if refuse_ids:
        check_ids(corpora, vocab_size, mask_token_id, cache_of(data))
    return PackedSequences(
        corpora, readings(data, corpora, split, seed, [()] * len(corpora)), blend, mask_token_id
    )


def mixture(data: DataConfig, split: str) -> tuple[list[Corpus], Blend | None]:
    """The corpora that have sequences in a split, and their order; None for a single one.

    Every rank must call it; BadInput, on every rank alike, for files that cannot be used.
    """
    corpora, weights = from_first_rank(_corpora_of, data, split)
    names = [corpus.entry for corpus in corpora]
    return corpora, Blend(names, weights) if len(names) > 1 else None


def readings(
    data: DataConfig, corpora: list[Corpus], split: str, seed: int, read: Sequence[tuple[Read, ...]]
) -> list[Reading]:
    """The sequences of each corpus at data.sequence_length, after what was read of it at others.

    Every rank must call it: rank 0 builds the indices, the others are told and load.
    """
    places = from_first_rank(_places, data, corpora, split, seed, read)
    return [
        opened(place, corpus, seed) if place else conversations(data, corpus, split, seed, earlier)
        for place, corpus, earlier in zip(places, corpora, read, strict=True)
    ]


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


def _places(
    data: DataConfig, corpora: list[Corpus], split: str, seed: int, read: Sequence[tuple[Read, ...]]
) -> list[Places | None]:
    """Of conversations, which are packed in memory, None."""
    return [
        None if corpus.holds_conversations else places_of(data, corpus, split, seed, earlier)
        for corpus, earlier in zip(corpora, read, strict=True)
    ]
