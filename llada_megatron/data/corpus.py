"""A corpus on disk: Megatron's .bin/.idx, what was said when it was prepared, and its reading.

The .bin holds the tokens of every document, one after the other. The .idx holds a header of 34 bytes,
an int32 length and an int64 byte offset per document, and the document numbers.
"""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from llada_megatron.config.errors import BadInput
from llada_megatron.config.flops import DocumentLengths

_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document indices
IDX_HEADER_BYTES = _INDEX_HEADER.size
_TOKEN_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}

_SIDECAR_TYPES = {"tokenizer": str, "tokenizer_sha256": str, "vocab_size": int, "tokens": int, "bytes": int}


@dataclass(frozen=True)
class CorpusIndex:
    """The .idx of a corpus, checked against its .bin; arrays are memory-mapped."""

    prefix: str
    dtype: numpy.dtype[Any]
    document_lengths: numpy.ndarray
    """int32 [documents], in tokens."""
    document_offsets: numpy.ndarray
    """int64 [documents], in bytes of the .bin."""

    @property
    def tokens(self) -> int:
        """Tokens of the corpus."""
        return int(self.document_lengths.sum(dtype=numpy.int64))

    @property
    def log_normal(self) -> DocumentLengths:
        """The log-normal distribution with the mean and deviation of the lengths' logarithms."""
        logs = numpy.log(self.document_lengths[self.document_lengths > 0])
        return DocumentLengths(float(numpy.exp(logs.mean())), max(float(logs.std()), 0.01))


def read_index(prefix: str) -> CorpusIndex:
    """Return the checked index of `prefix`.bin and `prefix`.idx.

    A document is one sequence of the .idx, as in megatron-core's GPTDataset. Raises BadInput when a file
    is missing, truncated, damaged, no .idx, or without tokens.
    """
    bin_path, idx_path = f"{prefix}.bin", f"{prefix}.idx"
    for path in (bin_path, idx_path):
        if not os.path.isfile(path):
            raise BadInput(f"{path} does not exist: data.path names prefixes of .bin/.idx pairs.")
    with open(idx_path, "rb") as file:
        header = file.read(_INDEX_HEADER.size)
    if len(header) < _INDEX_HEADER.size:
        raise BadInput(f"{idx_path} is truncated: it is shorter than its header.")
    magic, version, code, documents, document_indices = _INDEX_HEADER.unpack(header)
    if magic != _INDEX_MAGIC or version != 1 or code not in _TOKEN_DTYPES:
        raise BadInput(f"{idx_path} is not an index of Megatron token ids: its header is unknown.")
    idx_bytes = _INDEX_HEADER.size + 12 * documents + 8 * document_indices
    if os.path.getsize(idx_path) < idx_bytes:
        raise BadInput(
            f"{idx_path} is truncated: {documents} documents need {idx_bytes} bytes, "
            f"it has {os.path.getsize(idx_path)}."
        )
    if documents == 0:
        raise BadInput(f"{idx_path} holds no documents: prepare the corpus again.")
    dtype = numpy.dtype(_TOKEN_DTYPES[code])
    lengths = numpy.memmap(idx_path, "<i4", "r", _INDEX_HEADER.size, (documents,))
    offsets = numpy.memmap(idx_path, "<i8", "r", _INDEX_HEADER.size + 4 * documents, (documents,))
    ends = offsets + lengths * numpy.int64(dtype.itemsize)
    # megatron-core asserts that the last document ends with the last sequence.
    last = numpy.memmap(idx_path, "<i8", "r", idx_bytes - 8, (1,))[0] if document_indices else None
    if (
        min(lengths.min(), offsets.min(), ends.min()) < 0
        or (offsets % dtype.itemsize).any()
        or last != documents
    ):
        raise BadInput(f"{idx_path} is damaged: its lengths and offsets name no tokens. Make it again.")
    bin_bytes = int(ends.max())
    if os.path.getsize(bin_path) < bin_bytes:
        raise BadInput(
            f"{bin_path} is truncated: its index needs {bin_bytes} bytes, it has {os.path.getsize(bin_path)}."
        )
    if bin_bytes == 0:
        raise BadInput(f"{bin_path} holds no tokens: prepare the corpus again.")
    return CorpusIndex(prefix, dtype, lengths, offsets)


def mapped_lengths(prefix: str, documents: int) -> numpy.ndarray:
    """int32 [documents], in tokens, of an index that was checked before."""
    return numpy.memmap(f"{prefix}.idx", "<i4", "r", IDX_HEADER_BYTES, (documents,))


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """Return what `prepare_corpus` wrote beside the corpus, or None for a corpus prepared elsewhere.

    Raises BadInput for one that is damaged.
    """
    path = Path(f"{prefix}.json")
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        head = file.read(2**16)  # someone else's .json of this name may be a corpus itself
    if b'"tokenizer_sha256"' not in head:
        return None
    try:
        sidecar = json.loads(head)
        if all(type(sidecar[key]) is kind for key, kind in _SIDECAR_TYPES.items()):
            return sidecar
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    raise BadInput(f"{path}, which tells the corpus's tokenizer, is damaged: prepare the corpus again.")
