"""The objectives that a stage of the schedule can have, without torch: their names and their geometry.

What planning, FLOPs, MFU and pictures need to know of an objective stands here; what computes it is the class
that `module` names. To add one (docs/extending.md): a line in OBJECTIVES, that module, and its settings in
schema.py if it has any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from llada_megatron.config.schema import Config, DiffusionConfig


@dataclass(frozen=True)
class Figure:
    """A figure of every step besides the loss: means over the global batch, in bins."""

    bins: int
    label: str = ""
    """Of the axis that the bins divide evenly, from 0 to 1; empty: no picture is drawn."""
    unit: str = ""
    title: str = ""


@dataclass(frozen=True)
class RowBytes:
    """What readout and loss need of each supervised row, beside its hidden state, label and logits."""

    kept: int = 12
    """Bytes until backward: the row's place (8), and what the loss keeps (a weight, 4)."""
    batch: int = 36
    """Bytes in a micro-batch: place (8), label (8), weight (4), and a bin (8) of each of two figures."""
    kept_beside_batch: int = 4
    """Bytes until backward where the micro-batch is kept whole: what the head returned."""
    kept_with_logits: int = 9
    """Bytes until backward where one chunk is all: the label's column (8), whether it is on this rank (1)."""
    sums: tuple[int, ...] = (4, 4, 4)
    """Bytes of each message among tensor-parallel ranks: largest logit, label's, sum of exponentials."""
    forward_copies: int = 0
    """fp32 copies of the logits that its forward makes at a time, beyond the one that it keeps."""
    backward_copies: int = 0
    """The same of its backward, beyond the one that was kept."""


@dataclass(frozen=True)
class ReadBefore:
    """What the head reads out in a pass before the step's own."""

    rows: Callable[[DiffusionConfig, int], float]
    """Positions of a sequence of L tokens that the head is applied to, on average."""
    sums: tuple[int, ...]
    """Bytes of each message of a row among tensor-parallel ranks."""


@dataclass(frozen=True)
class Geometry:
    """How an objective lays out a sequence of L data tokens."""

    module: str
    """Of its class OBJECTIVE."""
    causal: bool
    """Whether it trains an autoregressive model: blocks of 1, and an exact likelihood instead of a bound."""
    reads_clean_half: bool
    """Whether the model reads `[x_t ; x_0]`, where a sequence has several blocks."""
    supervised: Callable[[DiffusionConfig, int], float]
    """Positions of a sequence of L tokens that the head is applied to, on average."""
    supervises_clean_half: bool = False
    """Whether clean rows are among them, so that `ModelInputs.noisy_outputs` is False."""
    figures: Mapping[str, Figure] = field(default_factory=dict)
    samples_per_sequence: Callable[[Config], int] = lambda config: 1
    """Samples in a row that read one sequence: sample i is made of sequence i // n."""
    together: Callable[[Config], int] = lambda config: 1
    """Those of them that must be in one micro-batch."""
    family: str = ""
    """The one value of model.family that learns it; empty: any may."""
    pairs: bool = False
    """Whether its corpora are pairs of a chosen and a rejected text."""
    denominators: int = 1
    """The loss is a sum of so many terms, each with a denominator of its own over the global batch."""
    passes_before: Callable[[Config, int], int] = lambda config, micro_batches: 0
    """Forward passes over a step's batch before its own, by the micro-batches of each rank: for drafts, or
    for counts that only the model tells."""
    row_bytes: RowBytes = RowBytes()
    drafts: ReadBefore | None = None
    """What the passes before read; None for what the loss reads."""

    @property
    def read_before(self) -> ReadBefore:
        """What each pass before the step's own reads out."""
        return self.drafts or ReadBefore(self.supervised, self.row_bytes.sums)

    @property
    def sums(self) -> int:
        """fp64 numbers that a micro-batch adds to the step's record: a sum and a count of each mean."""
        return 2 * (self.denominators + sum(figure.bins for figure in self.figures.values()))


def mask_rate(diffusion: DiffusionConfig) -> float:
    """Mean share of the positions that are masked; a complementary pair masks every position once."""
    return 0.5 if diffusion.complementary else (diffusion.mask_rate_min + diffusion.mask_rate_max) / 2


def _edited_rate(diffusion: DiffusionConfig) -> float:
    masked, editing = mask_rate(diffusion), diffusion.editing
    return masked + (1 - masked) * (1 if editing.kept_weight else editing.replaced)


def _complements(config: Config) -> int:
    return 2 if config.diffusion.complementary else 1


_DIFFUSION_FIGURES = {
    "loss_by_t": Figure(
        10,
        label="mask rate t",
        unit="nats per masked token",
        title="Cross entropy of the masked tokens by mask rate t.",
    ),
    "loss_by_block_position": Figure(32),
}

OBJECTIVES: dict[str, Geometry] = {
    "autoregressive": Geometry(
        module="llada_megatron.objectives.autoregressive",
        causal=True,
        reads_clean_half=False,
        supervised=lambda diffusion, length: length - 1,
        row_bytes=RowBytes(batch=20),
    ),
    "concepts": Geometry(
        module="llada_megatron.objectives.concepts",
        family="dlcm",
        causal=True,
        reads_clean_half=False,
        supervised=lambda diffusion, length: length - 1,
        figures={"boundary_rate": Figure(2), "boundary_probability": Figure(2)},
        denominators=2,
        passes_before=lambda config, micro_batches: int(micro_batches > 1),
        row_bytes=RowBytes(kept=8, batch=20),
        drafts=ReadBefore(lambda diffusion, length: 0, ()),
    ),
    "diffusion": Geometry(
        module="llada_megatron.objectives.diffusion",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: length * mask_rate(diffusion),
        samples_per_sequence=_complements,
        figures=_DIFFUSION_FIGURES,
    ),
    "multi_block": Geometry(
        module="llada_megatron.objectives.multi_block",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: (
            length * diffusion.multi_block.mean_rate(diffusion.mask_rate_min, diffusion.mask_rate_max)
        ),
        samples_per_sequence=lambda config: len(config.diffusion.multi_block.layouts),
        figures=_DIFFUSION_FIGURES,
    ),
    "editing": Geometry(
        module="llada_megatron.objectives.editing",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: length * _edited_rate(diffusion),
        samples_per_sequence=_complements,
        figures={
            **_DIFFUSION_FIGURES,
            "loss_by_t": replace(_DIFFUSION_FIGURES["loss_by_t"], bins=11),  # the last: not masked
            "loss_by_stand": Figure(3),  # masked, replaced, kept
        },
        row_bytes=RowBytes(batch=44),
    ),
    "oput": Geometry(
        module="llada_megatron.objectives.oput",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: length,
        samples_per_sequence=_complements,
        figures={"loss_by_stand": Figure(3), "right": Figure(3)},  # masked, drafted, kept
        passes_before=lambda config, micro_batches: config.diffusion.oput.turns,
        # model/readout.py, choice: the largest logit and the lowest id of it
        drafts=ReadBefore(lambda diffusion, length: length * mask_rate(diffusion), sums=(4, 8)),
        row_bytes=RowBytes(batch=44),
    ),
    "confidence": Geometry(
        module="llada_megatron.objectives.confidence",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: length * mask_rate(diffusion),
        samples_per_sequence=_complements,
        figures={**_DIFFUSION_FIGURES, "right": Figure(1), "entropy": Figure(1)},
        denominators=2,
        passes_before=lambda config, micro_batches: int(micro_batches > 1),
        # The readout's three figures (12) and its two sums (8) are kept besides; model/readout.py, at a
        # temperature of 1.
        row_bytes=RowBytes(
            kept=24,
            kept_beside_batch=12,
            kept_with_logits=17,
            sums=(4, 8, 16),
            forward_copies=1,
            backward_copies=1,
        ),
    ),
    "levenshtein": Geometry(
        module="llada_megatron.objectives.levenshtein",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: length,
        samples_per_sequence=_complements,
        figures={"loss_by_label": Figure(5)},
        row_bytes=RowBytes(batch=28),
    ),
    "preference": Geometry(
        module="llada_megatron.objectives.preference",
        causal=False,
        reads_clean_half=True,
        supervised=lambda diffusion, length: length / 2,
        samples_per_sequence=lambda config: config.preference.draws,
        together=lambda config: config.preference.draws,
        pairs=True,
        figures={
            name: Figure(1)
            for name in ("margin", "accuracy", "margin_variance", "chosen_bound", "rejected_bound")
        },
        denominators=2,
        # float64 weights and weighted cross entropies; the text's slot (8), and which side of its pair it is
        row_bytes=RowBytes(kept=33, batch=33, kept_beside_batch=12),
    ),
}
