"""Conversations in a corpus: whose token is whose, and sequences of whole conversations.

Beside PREFIX.bin/.idx, whose documents are conversations, lies PREFIX.roles.bin/.idx with one byte per
token: the number of its role, and ANSWER where a model is to learn to write it. In a corpus of preferences
documents 2i and 2i + 1 are the chosen and the rejected text of pair i.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import DataConfig, TooLong
from llada_megatron.data.corpus import CorpusIndex, read_index, read_sidecar
from llada_megatron.data.packing import best_fit, permutation, quantised
from llada_megatron.data.reading import TokenFiles

ROLES = ("", "system", "user", "assistant", "tool", "padding")
"""By number; the first is any role but these."""
PADDING = ROLES.index("padding")
ANSWER = 0x80
"""Added to the role of a token that is supervised."""


def roles_prefix(prefix: str) -> str:
    """Prefix of the pair that holds the roles of a corpus."""
    return f"{prefix}.roles"


def holds_conversations(prefix: str) -> bool:
    """Whether a corpus says whose tokens are whose."""
    return Path(f"{roles_prefix(prefix)}.idx").is_file()


def texts_of(prefix: str) -> int:
    """Documents that belong together: 2 in a corpus of preferences, else 1."""
    return 2 if _said(prefix)["format"] == "preference" else 1


def _said(prefix: str) -> dict[str, Any]:
    """What was said when conversations were prepared; BadInput where it is lost."""
    sidecar = read_sidecar(prefix)
    if (
        sidecar is None
        or not isinstance(sidecar.get("format"), str)
        or type(sidecar.get("end_of_document_id")) is not int
        or not 0 <= sidecar["end_of_document_id"] < sidecar["vocab_size"]
    ):
        raise BadInput(
            f"{prefix}.json is missing or damaged, which says what {roles_prefix(prefix)} means: prepare it"
            " again."
        )
    return sidecar


def read_roles(corpus: CorpusIndex) -> CorpusIndex:
    """The index of the roles of a corpus; BadInput where they do not belong to its tokens."""
    roles = read_index(roles_prefix(corpus.prefix))
    if (
        roles.dtype != np.uint8
        or not np.array_equal(roles.document_lengths, corpus.document_lengths)
        or len(corpus.document_lengths) % texts_of(corpus.prefix)
    ):
        raise BadInput(f"{roles.prefix}.idx and {corpus.prefix}.idx are not of one corpus: prepare it again.")
    return roles


def check_roles(roles: npt.NDArray[np.uint8], prefix: str) -> None:
    """BadInput where bytes of PREFIX.roles.bin are no roles."""
    if ((roles & ~np.uint8(ANSWER)) >= len(ROLES)).any():
        raise BadInput(f"{roles_prefix(prefix)}.bin is damaged: it holds what is no role. Prepare it again.")


class PackedConversations:
    """The sequences of one split of a corpus of conversations: endless, each epoch in an order of its own.

    A conversation, or the pair of a preference, lies in one sequence as a whole; each text of it is a
    document of its own, padded to a multiple of data.pad_to, and what is left of the sequence is one more
    document that nothing learns. What is packed with what is a function of the corpus, the settings and the
    seed.
    """

    def __init__(
        self,
        corpus: CorpusIndex,
        documents: np.ndarray,
        data: DataConfig,
        seed: int,
        *,
        may_be_empty: bool = False,
    ) -> None:
        """The texts of these documents. Raises BadInput where roles and tokens do not belong together, for a
        conversation that is too long where data.too_long says so, and for no sequence where that may not be.
        """
        self.dataset_path, self._data, self._seed = corpus.prefix, data, seed
        self._end_of_document_id = _said(corpus.prefix)["end_of_document_id"]
        self._tokens, self._roles = (
            TokenFiles([(index.prefix, index.dtype.name, len(index.document_lengths))])
            for index in (corpus, read_roles(corpus))
        )
        self._texts = texts_of(corpus.prefix)
        self._given = documents = documents.astype(np.int64).reshape(-1, self._texts)
        lengths = corpus.document_lengths[documents].astype(np.int64)
        self.too_long = self._shorten(documents, lengths)
        fits = lengths.all(axis=1)
        self._documents, self._lengths = documents[fits], lengths[fits]
        self._padded = quantised(self._lengths, data.pad_to)
        if not len(self._documents) and not may_be_empty:
            raise BadInput(
                f"{corpus.prefix}: no conversation of {len(documents)} fits into data.sequence_length="
                f"{data.sequence_length}: raise it, or set data.too_long=cut."
            )
        self._packing = best_fit(self._padded.sum(axis=1), data.sequence_length, seed)
        self._ordered: tuple[int, npt.NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    @property
    def sequences_per_epoch(self) -> int:
        """N: sequences of L tokens in the split."""
        return len(self._packing)

    @property
    def padding(self) -> float:
        """Share of the tokens of an epoch that belong to no conversation."""
        return 1 - int(self._lengths.sum()) / (len(self._packing) * self._data.sequence_length)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Tokens [L], roles uint8 [L], cu_seqlens [documents + 1] and document_ids [documents] of an index
        >= 0.
        """
        epoch, position = divmod(int(index), self.sequences_per_epoch)
        length = self._data.sequence_length
        tokens = np.full(length, self._end_of_document_id, np.int64)
        roles = np.full(length, PADDING, np.uint8)
        after = PADDING | (ANSWER if self._data.supervise_padding else 0)
        ends, documents = [0], []
        for conversation in self._packing[int(self._order(epoch)[position])]:
            for text in range(self._texts):
                document, size = (
                    int(self._documents[conversation, text]),
                    int(self._lengths[conversation, text]),
                )
                start, stop = ends[-1], ends[-1] + int(self._padded[conversation, text])
                tokens[start : start + size] = self._tokens.read([(document, 0, size)])[0]
                roles[start : start + size] = self._roles.read([(document, 0, size)])[0]
                roles[start + size : stop] = after
                ends.append(stop)
                documents.append(document)
        check_roles(roles, self.dataset_path)
        if ends[-1] < length:
            ends.append(length)
            documents.append(-1)
        return {
            "tokens": tokens,
            "roles": roles,
            "cu_seqlens": np.array(ends, np.int32),
            "document_ids": np.array(documents),
        }

    def unread(self, count: int) -> npt.NDArray[np.int64]:
        """Documents that the first `count` sequences leave of the epoch in which they end.

        Those among them that were too long for a sequence.
        """
        epoch, position = divmod(count, self.sequences_per_epoch)
        read = [self._packing[sequence] for sequence in self._order(epoch)[:position].tolist()]
        documents = self._documents[np.concatenate(read)] if read else self._documents[:0]
        return self._given[~np.isin(self._given[:, 0], documents[:, 0])].ravel()

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """The order of the sequences in an epoch, a function of (seed, epoch) alone."""
        known, order = self._ordered  # taken at once: several threads may read
        if known != epoch:
            order = permutation(self._seed, epoch, len(self._packing))
            self._ordered = epoch, order
        return order

    def _shorten(self, documents: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> int:
        """Set the length of what does not fit to where it is cut, or to 0; returns how many did not fit."""
        data = self._data
        long = np.flatnonzero(quantised(lengths, data.pad_to).sum(axis=1) > data.sequence_length)
        if len(long) and data.too_long is TooLong.refuse:
            raise BadInput(
                f"{self.dataset_path}: conversation {documents[long[0], 0]} (counted from 0) has"
                f" {lengths[long[0]].sum()} tokens, more than data.sequence_length={data.sequence_length}, as"
                f" have {len(long) - 1} others: raise it, or set data.too_long to drop or cut."
            )
        room = data.sequence_length // data.pad_to * data.pad_to
        for conversation in long:
            keep = 0
            if data.too_long is TooLong.cut and self._texts == 1:
                (own,) = self._roles.read([(int(documents[conversation, 0]), 0, None)])
                is_answer = own >= ANSWER
                stops = 1 + np.flatnonzero(is_answer & ~np.append(is_answer[1:], False))
                keep = max((stop for stop in stops.tolist() if stop <= room), default=0)
            lengths[conversation] = keep
        return len(long)
