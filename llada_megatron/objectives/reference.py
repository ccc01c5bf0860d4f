"""What the reference of a preference thinks of every text: bounds by document and draw, in a file beside the
corpus.

`llada score` writes PREFIX.scores.safetensors once; training reads numbers instead of keeping a second
model. A bound belongs to weights, masks and tokens: what decides them is in the file, and compared.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llada_megatron.config.errors import BadInput
from llada_megatron.config.foreign import parse_json
from llada_megatron.config.schema import Config
from llada_megatron.data.corpus import read_index
from llada_megatron.data.packed import fingerprint
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


@dataclass
class ReferenceScores:
    """Bounds float64 [documents, draws] of each corpus, NaN where a text was not scored."""

    bounds: dict[str, np.ndarray]
    """By the prefix of the corpus."""

    @classmethod
    def load(cls, config: Config, block_size: int) -> ReferenceScores:
        """The scores of every corpus of the run.

        Raises BadInput for a corpus without scores and for those of other tokens, masks or, where the run
        starts from a checkpoint, another model.
        """
        start = find(config.checkpoint.init_from) if config.checkpoint.init_from else None
        bounds = {}
        for prefix, tokens in zip(config.data.path, fingerprint(config.data)["corpora"], strict=True):
            found, said = _read(prefix)
            expected = {"tokens": tokens, **scored_under(config, block_size)}
            if start is not None:
                expected["weights"] = weights_digest(start)
            if other := [key for key, value in expected.items() if said.get(key) != value]:
                now = {**expected, "tokens": "those that are there", "weights": config.checkpoint.init_from}
                was = {**said, "tokens": "others", "weights": said.get("checkpoint")}
                differences = ", ".join(f"{key} was {was.get(key)} and is {now[key]}" for key in other)
                raise BadInput(f"{scores_file(prefix)}: {differences}; run `llada score` again.")
            bounds[prefix] = found
        return cls(bounds)

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
