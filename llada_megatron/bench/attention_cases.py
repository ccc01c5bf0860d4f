"""What `llada bench attention` measures: lengths, block sizes, documents and head shapes, by suite."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from llada_megatron.data.synthetic import log_normal_documents

LOG_NORMAL = 6.5, 1.0
"""Mean and deviation of the logarithm of a packed document's tokens: a median of 665."""


@dataclass(frozen=True)
class HeadShape:
    """Query heads, key and value heads, channels of a head."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads}:{self.kv_heads}x{self.head_dim}"


@dataclass(frozen=True)
class Case:
    """One sequence of L data tokens."""

    length: int
    block_size: int
    documents: str
    """`one`, `packed` (log-normal lengths), or `N tokens` for equal ones."""
    shape: HeadShape

    @property
    def name(self) -> str:
        return f"L={self.length} block={self.block_size} {self.documents} {self.shape}"

    @property
    def clean_copy(self) -> bool:
        """Whether there is a clean half: one block that spans the sequence has none (MDLM)."""
        return self.block_size < self.length

    @property
    def positions(self) -> int:
        """S: 2L with a clean half, else L."""
        return self.length * (2 if self.clean_copy else 1)

    def cu_seqlens(self) -> list[int]:
        """Document starts and the end."""
        if self.documents == "one":
            return [0, self.length]
        if self.documents != "packed":
            return [*range(0, self.length, int(self.documents.split()[0])), self.length]
        return log_normal_documents(*LOG_NORMAL, seed=0, length=self.length)


SMALL = HeadShape(8, 8, 64)
MINI = HeadShape(16, 4, 128)
FLASH = HeadShape(32, 4, 128)


def _h100() -> list[Case]:
    cases = []
    for shape, documents, power in product((MINI, FLASH), ("one", "packed", "128 tokens"), range(7)):
        length = 1024 << power
        blocks = (1, 4, 32, 128) if documents == "128 tokens" else (1, 4, 32, 256, 1024)
        cases += [Case(length, block, documents, shape) for block in blocks if block < length]
        cases.append(Case(length, length, documents, shape))
    return cases


SUITES: dict[str, list[Case]] = {
    "quick": [Case(256, 32, "one", SMALL), Case(512, 4, "128 tokens", SMALL)],
    "cpu": [
        *(Case(2048, block, "one", SMALL) for block in (4, 32, 256, 2048)),
        *(Case(4096, block, "one", SMALL) for block in (4, 32, 256)),
        Case(4096, 32, "packed", SMALL),
        Case(2048, 32, "128 tokens", SMALL),
        Case(16384, 32, "1024 tokens", SMALL),
    ],
    "gpu": [
        *(Case(4096, 32, documents, FLASH) for documents in ("one", "packed")),
        Case(4096, 4096, "packed", FLASH),
        Case(4096, 32, "packed", MINI),
    ],
    "h100": _h100(),
}
