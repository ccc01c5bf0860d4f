"""The held-out sequences that a model is evaluated on, by domain, and what the text itself says of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from llada_megatron.config.choices import BadSamples
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config, DataConfig
from llada_megatron.data.fingerprint import content_of
from llada_megatron.data.packed import BadSample, PackedSample, PackedSequences, build_sequences, held_out
from llada_megatron.data.shards import cache_of, domains, remember
from llada_megatron.evaluate.baselines import bytes_per_token, entropies
from llada_megatron.objectives.batch import read_sample
from llada_megatron.parallel.ranks import from_first_rank, warn

BASELINE_SEQUENCES = 4096
"""The entropies of the text are taken over at most this many held-out sequences."""


class HeldOut:
    """The first `evaluation.sequences` held-out sequences of each domain.

    Domains are the entries of data.validation; without any, the corpora of data.path whose tails are blended,
    and the sequences are the first of the blend.
    """

    def __init__(self, config: Config) -> None:
        """Every rank must call it. Raises BadInput for data that cannot be used."""
        self.samples: list[PackedSample] = []
        self.places: list[int] = []
        """Of each sequence among those of its entry: what its masks are drawn by."""
        parts = [_build(config, data) for data in held_out(config.data).values()]
        for part in parts:
            own = list(islice(_good(part, config, config.evaluation.sequences), config.evaluation.sequences))
            self.samples += own
            self.places += range(len(own))
        corpora = [corpus for part in parts for corpus in part.corpora]
        names = domains([corpus.entry for corpus in corpora])
        self.domains: dict[str, list[int]] = {}
        """By name the numbers of its samples."""
        for number, sample in enumerate(self.samples):
            self.domains.setdefault(names[sample.corpus], []).append(number)
        prefixes = {names[each.entry]: [shard.prefix for shard in each.shards] for each in corpora}
        prefixes[""] = [prefix for own in prefixes.values() for prefix in own]
        said = from_first_rank(_of_the_text, parts, prefixes, config)
        self.bytes_per_token: dict[str, float | None] = said["bytes_per_token"]
        """By domain; of all of them under no name."""
        self.entropies: dict[str, float] = said["entropies"]


def _build(config: Config, data: DataConfig) -> PackedSequences:
    return build_sequences(
        data,
        split="validation",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
        refuse_ids=config.training.bad_samples is BadSamples.refuse,
    )


def _good(data: PackedSequences, config: Config, wanted: int) -> Iterator[PackedSample]:
    """The first sequences of the data, without those that training.bad_samples leaves out.

    Among as many as the entropies are taken over, or `wanted` of them.
    """
    sequences = min(data.sequences_per_epoch, max(wanted, BASELINE_SEQUENCES))
    found = 0
    for index in range(sequences):
        try:
            yield read_sample(data, index, config.model.vocab_size)
        except BadSample as fault:
            if config.training.bad_samples is BadSamples.refuse:
                raise
            warn(f"left out of the evaluation: {fault}")
        else:
            found += 1
    if not found:
        raise BadInput(f"None of the first {sequences} held-out sequences can be read: mend the corpus.")


def _of_the_text(
    parts: list[PackedSequences], prefixes: dict[str, list[str]], config: Config
) -> dict[str, Any]:
    """What needs no model: remembered beside the indices, since thousands of sequences are read for it."""
    settings = {
        name: value
        for name, value in asdict(config.data).items()
        if name not in ("path", "validation", "cache_dir", "tokenizer")
    }
    identity = {
        "corpora": [[content_of(corpus) for corpus in part.corpora] for part in parts],
        "data": settings,
        "seed": config.run.seed,
        "ids": [config.model.vocab_size, config.model.mask_token_id, config.training.bad_samples],
        "sequences": [config.evaluation.sequences, BASELINE_SEQUENCES],
        "of": "validation" if config.data.validation else "path",
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    path = cache_of(config.data) / f"text-{digest[:32]}.json"
    found = _read(path)
    if found is None:
        wanted = config.evaluation.sequences
        found = entropies([sample for part in parts for sample in _good(part, config, wanted)])
        remember(path, found)
    return {
        "entropies": found,
        "bytes_per_token": {name: bytes_per_token(own) for name, own in prefixes.items()},
    }


def _read(path: Path) -> dict[str, float] | None:
    try:
        found = json.loads(path.read_bytes())
        return {name: float(found[name]) for name in ("unigram", "bigram")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
