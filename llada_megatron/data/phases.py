"""The sequences of a whole run, phase by phase: none twice and none left out within an epoch of a corpus.

Each phase goes on in every corpus where the phases before it stopped, whatever its mixture and its L.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from llada_megatron.config.schedule import Schedule
from llada_megatron.config.schema import Config
from llada_megatron.config.stage_settings import Phase, phases_of
from llada_megatron.data.blend import Blend
from llada_megatron.data.packed import PackedSequences, mixture, readings, refuse_pairs
from llada_megatron.data.readings import Read, Reading
from llada_megatron.data.shards import Corpus, cache_of
from llada_megatron.data.token_ids import check_ids
from llada_megatron.parallel.ranks import from_first_rank

Key = tuple[str, str, int]
"""What makes a corpus the same in two phases: the digests of its files, and which of several it is."""
History = dict[Key, tuple[Read, ...]]


class PhasedData:
    """`at(step)`: the sequences that a step trains, by their global index."""

    def __init__(self, config: Config, schedule: Schedule, *, step: int = 0, refuse_ids: bool = True) -> None:
        """Of a run that goes on with a step; every rank must call it.

        Raises BadInput as build_sequences does, and for a corpus of preferences where a stage would learn its
        rejected answers.
        """
        self._schedule, self._phases = schedule, phases_of(config, schedule)
        self._mixtures: list[tuple[list[Corpus], Blend | None]] = []
        self._sequences: list[PackedSequences | None] = []
        objectives = {stage.name: stage.objective for stage in schedule.stages}
        opened: dict[Any, Reading] = {}
        for phase in self._phases:
            from_first_rank(refuse_pairs, phase.data, {objectives[name] for name in phase.stages})
            read = self._read(phase.first_step)
            self._mixtures.append(mixture(phase.data, "train"))
            is_over = phase.end_step <= step < schedule.total_steps
            self._sequences.append(None if is_over else self._open(config, phase, read, opened, refuse_ids))

    def at(self, step: int) -> PackedSequences:
        """The sequences of a step of this start or later."""
        number = next((n for n, phase in enumerate(self._phases) if step < phase.end_step), -1)
        sequences = self._sequences[number]
        assert sequences is not None, f"step {step} is over"
        return sequences

    def phases_begun(self, step: int) -> int:
        """How many phases the first `step` steps are of."""
        return sum(phase.first_step < step for phase in self._phases)

    def read_before(self, step: int) -> list[dict[str, Any]]:
        """What the first `step` steps read of each corpus, in plain JSON: [L, sequences] in their order."""
        named: dict[Key, str] = {}
        for corpora, _ in self._mixtures:
            named |= {key: corpus.entry for key, corpus in zip(_keys(corpora), corpora, strict=True)}
        return [
            {"corpus": named[key], "idx_sha256": key[0], "sequences": [list(each) for each in read]}
            for key, read in self._read(step).items()
        ]

    def _read(self, step: int) -> History:
        """What is known of the corpora of the phases so far."""
        history: History = {}
        for phase, (corpora, blend) in zip(self._phases, self._mixtures, strict=False):
            samples = self._schedule.samples_before(min(step, phase.end_step))
            samples -= self._schedule.samples_before(phase.first_step)
            if samples <= 0:
                break
            count, length = -(-samples // phase.samples_per_sequence), phase.data.sequence_length
            counts = [count] if blend is None else blend.before(count)
            for key, own in zip(_keys(corpora), counts, strict=True):
                earlier, begins = _so_far(history.get(key, ()), length)
                if begins + own:
                    history[key] = (*earlier, (length, begins + own))
        return history

    def _open(
        self, config: Config, phase: Phase, read: History, opened: dict[Any, Reading], refuse_ids: bool
    ) -> PackedSequences:
        (corpora, blend), mask_token_id = self._mixtures[-1], config.model.mask_token_id
        if refuse_ids:
            check_ids(corpora, config.model.vocab_size, mask_token_id, cache_of(phase.data))
        length = phase.data.sequence_length
        so_far = [_so_far(read.get(key, ()), length) for key in _keys(corpora)]
        wanted = [(key, length, earlier) for key, (earlier, _) in zip(_keys(corpora), so_far, strict=True)]
        missing = [number for number, each in enumerate(wanted) if each not in opened]
        own = [corpora[number] for number in missing]
        earlier = [so_far[number][0] for number in missing]
        found = readings(phase.data, own, "train", config.run.seed, earlier)
        opened |= {wanted[number]: reading for number, reading in zip(missing, found, strict=True)}
        return PackedSequences(
            corpora,
            [opened[each] for each in wanted],
            blend,
            mask_token_id,
            first=phase.first_sequence,
            begins=[begins for _, begins in so_far],
        )


def _so_far(read: tuple[Read, ...], length: int) -> tuple[tuple[Read, ...], int]:
    """What was read of a corpus at other lengths before, and how many sequences since of this one."""
    return (read[:-1], read[-1][1]) if read and read[-1][0] == length else (read, 0)


def _keys(corpora: list[Corpus]) -> list[Key]:
    seen: Counter[tuple[str, str]] = Counter()
    keys = []
    for corpus in corpora:
        content = corpus.digest("idx_sha256"), corpus.digest("bin_sampled_sha256")
        keys.append((*content, seen[content]))
        seen[content] += 1
    return keys
