"""What the reference of a preference thinks of every text: bounds by document and draw, in a file beside the
corpus.

`llada score` writes PREFIX.scores.safetensors once; training reads numbers instead of keeping a second
model. A bound belongs to weights, masks and tokens: what decides them is in the file, and compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json
from llada_megatron.config.schema import Config
from llada_megatron.data.conversations import holds_conversations, texts_of
from llada_megatron.data.corpus import read_index
from llada_megatron.data.fingerprint import fingerprint
from llada_megatron.record.manifest import Checkpoint, find

BOUNDS, SAID = "bounds", "of"


def scores_file(prefix: str) -> Path:
    """Where the scores of a corpus lie."""
    return Path(f"{prefix}.scores.safetensors")


def weights_digest(checkpoint: Checkpoint) -> str:
    """Identity of a checkpoint's weights: SHA-256 over those of its files."""
    return hashlib.sha256(json.dumps(checkpoint.manifest.files, sort_keys=True).encode()).hexdigest()


def scored_under(config: Config, block_size: int) -> dict[str, Any]:
    """What decides the masks of a text, besides the text."""
    data, diffusion = config.data, config.diffusion
    return {
        "run.seed": config.run.seed,
        "preference.draws": config.preference.draws,
        "block size of the stage": block_size,
        "diffusion.block_grid": diffusion.block_grid.value,
        "diffusion.gives_mask_token": diffusion.gives_mask_token,
        "model.mask_token_id": config.model.mask_token_id,
        "data.pad_to": data.pad_to,
        "data.supervise_padding": data.supervise_padding,
    }


def check_pairs(prefix: str) -> None:
    """Raise BadInput for a corpus of anything but preferences."""
    read_index(prefix)  # says where there is none at all
    if not holds_conversations(prefix) or texts_of(prefix) == 1:
        raise BadInput(
            f"{prefix} holds no pairs, and a preference is learnt from nothing else: prepare it with `llada"
            " data prepare --format preference`, or take it out of data.path."
        )


@dataclass
class ReferenceScores:
    """Bounds float64 [documents, draws] of each corpus, NaN where a text was not scored."""

    bounds: dict[str, np.ndarray]
    """By the prefix of the corpus."""
    reference: list[dict[str, str | None]] = field(default_factory=list)
    """Of each corpus the digest of the `weights` that scored it, and their `checkpoint`."""
    block_size: int = 0
    """Of the stage whose masks were scored; 0: zeros that stand for any."""

    @classmethod
    def load(
        cls, config: Config, block_size: int, reference: list[dict[str, str | None]] | None = None
    ) -> ReferenceScores:
        """The scores of every corpus of the run.

        reference: that of the scores which the run began with; None for a run that begins. Raises BadInput
        for a corpus without pairs or scores and for scores of other tokens, masks or weights: those of the
        checkpoint that a run begins with, where it has one, and for its whole life those that it began with.
        """
        if reference is None and config.checkpoint.init_from:
            weights = weights_digest(find(config.checkpoint.init_from))
            reference = [{"weights": weights, "checkpoint": config.checkpoint.init_from}] * len(
                config.data.path
            )
        for prefix in config.data.path:
            check_pairs(prefix)
        bounds, read, corpora = {}, [], fingerprint(config.data)["corpora"]
        for number, prefix in enumerate(config.data.path):
            bounds[prefix], said = _read(prefix)
            read.append({key: said.get(key) for key in ("weights", "checkpoint")})
            expected = {"tokens": corpora[number], **scored_under(config, block_size)}
            now = {**expected, "tokens": "those that are there"}
            if reference is not None:
                expected["weights"] = reference[number]["weights"]
                now["weights"] = reference[number]["checkpoint"]
            if other := [key for key, value in expected.items() if said.get(key) != value]:
                was = {**said, "tokens": "others", "weights": said.get("checkpoint")}
                differences = ", ".join(f"{key} was {was.get(key)} and is {now[key]}" for key in other)
                raise BadInput(f"{scores_file(prefix)}: {differences}; run `llada score` again.")
        return cls(bounds, read, block_size)

    def of(self, prefix: str, document: int) -> np.ndarray:
        """Bounds float64 [draws] of a text; BadInput for one that was not scored."""
        found = self.bounds[prefix][document]
        if not np.isfinite(found).all():
            raise BadInput(
                f"{scores_file(prefix)} says nothing of document {document}: run `llada score` again."
            )
        return found


def write_scores(prefix: str, bounds: np.ndarray, said: dict[str, Any]) -> Path:
    """Write the scores of a corpus, whole or not at all; bounds float64 [documents, draws]."""
    path = scores_file(prefix)
    aside = path.with_name(f"{path.name}.partial")
    save_file({BOUNDS: bounds}, aside, metadata={SAID: json.dumps(said, sort_keys=True)})
    aside.replace(path)
    return path


def _read(prefix: str) -> tuple[np.ndarray, dict[str, Any]]:
    path, documents = scores_file(prefix), len(read_index(prefix).document_lengths)
    try:
        with safe_open(path, "numpy") as file:
            bounds, said = file.get_tensor(BOUNDS), parse_json(file.metadata()[SAID])
        if bounds.dtype != np.float64 or bounds.ndim != 2 or len(bounds) != documents:
            raise ValueError(f"{bounds.dtype} {list(bounds.shape)} for {documents} documents")
        return bounds, dict(said)
    except FileNotFoundError:
        raise BadInput(f"{path} does not exist: run `llada score CHECKPOINT {prefix}`.") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} holds no scores ({error}): run `llada score` again.") from None
