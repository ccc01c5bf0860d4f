"""What a run reads, counted token by token.

Token = 1000 * document + position; the documents of the second corpus are counted from 1000.
"""

from collections import Counter
from dataclasses import replace

import numpy
import pytest

from llada_megatron.config.compose import compose
from llada_megatron.config.rules import schedule_of
from llada_megatron.config.schema import DataConfig, StageConfig
from llada_megatron.data.phases import PhasedData
from llada_megatron.data.readings import conversations
from llada_megatron.data.shards import survey
from tests.data.test_packed import MASK, lengths_of, write_corpus
from tests.objectives.conversations import write

CORPORA = {"first": (80, 0), "second": (120, 1000)}


@pytest.fixture
def of_run(tmp_path):
    """Config and schedule of a run of these stages."""
    for seed, (name, (documents, first)) in enumerate(CORPORA.items()):
        write_corpus(tmp_path / name, lengths_of(documents, seed), first_document=first)

    def build(*stages, complementary=False):
        config = compose(["experiment=parity", f"data.path=[{tmp_path}/first]", "data.split='1,0'"])
        config.model.vocab_size, config.model.mask_token_id = 2**31, MASK
        config.data.sequence_length = 16
        config.layout.global_batch = 4
        config.diffusion.complementary = complementary
        paths = {name: f"{tmp_path}/{name}" for name in CORPORA}
        config.schedule.stages = [
            StageConfig(
                name=f"stage_{number}",
                block_size="1",
                **{**stage, "path": [paths[name] for name in stage.get("path", [])]},
            )
            for number, stage in enumerate(stages)
        ]
        return config, schedule_of(config)

    return build


def sequences_of(data, schedule, first, end):
    """Global indices of the sequences of some steps, complements once."""
    return [
        (data.at(step), index)
        for step in range(first, end)
        for index in range(schedule.samples_before(step), schedule.samples_before(step + 1))
    ]


def read(config, schedule, first=0, end=None) -> list[tuple[int, ...]]:
    """The tokens of every sample, by a start that goes on with step `first`."""
    data = PhasedData(config, schedule, step=first)
    return [
        tuple(part[index].tokens.tolist())
        for part, index in sequences_of(data, schedule, first, end or schedule.total_steps)
    ]


CHANGES = (
    dict(tokens=16 * 4 * 7),
    dict(tokens=16 * 4 * 5, path=["first", "second"], weights=[1.0, 3.0]),  # a corpus is added
    dict(tokens=48 * 4 * 5, path=["first", "second"], sequence_length=48),  # longer, by the tokens
    dict(tokens=48 * 6 * 2, path=["second"], sequence_length=48, global_batch=6),
    dict(tokens=16 * 4 * 3, path=["second", "first"], weights=[1.0, 1.0]),  # short again, the other way round
    dict(tokens=32 * 2 * 3, sequence_length=32, global_batch=2),
)


def test_changes_of_length_mixture_and_batch_read_no_token_twice_and_lose_none(of_run):
    config, schedule = of_run(*CHANGES, dict(tokens=16 * 4 * 200))
    samples = read(config, schedule)
    boundary = {stage.name: schedule.samples_before(stage.end_step) for stage in schedule.stages}
    before = Counter(token for sample in samples[: boundary["stage_5"]] for token in sample)
    assert max(before.values()) == 1  # a brute-force list of what was read
    lengths = {len(sample) for sample in samples}
    assert lengths == {16, 32, 48}
    # The last stage reads the first corpus to the end of its epoch before anything of it comes again.
    total = sum(lengths_of(80))
    of_first = [[t for t in sample if t < 10**6] for sample in samples]
    seen: Counter[int] = Counter()
    for sample in of_first:
        if sample and max(seen[token] for token in sample):
            break
        seen.update(sample)
    assert total - 32 < sum(seen.values()) <= total


def test_a_start_at_any_step_reads_what_the_run_would_have_read(of_run):
    config, schedule = of_run(*CHANGES)
    whole = read(config, schedule)
    for step in range(0, schedule.total_steps, 3):
        assert read(config, schedule, step) == whole[schedule.samples_before(step) :]


def test_stages_of_one_mixture_are_one_order_whatever_their_number(of_run):
    one, several = (
        read(*of_run(*stages))
        for stages in ([dict(tokens=16 * 4 * 12)], [dict(tokens=16 * 4 * steps) for steps in (5, 3, 4)])
    )
    assert one == several


def test_what_is_read_is_written_down_by_corpus_and_length(of_run):
    config, schedule = of_run(*CHANGES)
    data = PhasedData(config, schedule)
    counts = [Counter() for _ in range(schedule.total_steps + 1)]
    for step in range(schedule.total_steps):
        counts[step + 1] = counts[step].copy()
        for part, index in sequences_of(data, schedule, step, step + 1):
            sample = part[index]
            counts[step + 1][sample.corpus.rsplit("/", 1)[1], len(sample.tokens)] += 1
    for step in range(schedule.total_steps + 1):
        said = Counter()
        for each in data.read_before(step):
            for length, sequences in each["sequences"]:
                said[each["corpus"].rsplit("/", 1)[1], length] += sequences
        assert said == counts[step]


def test_a_sequence_that_two_samples_read_is_read_once(of_run):
    """An autoregressive stage, then complements: the second goes on behind the first."""
    stages = [dict(tokens=16 * 4 * 3, objective="autoregressive"), dict(tokens=16 * 4 * 4)]
    config, schedule = of_run(*stages, complementary=True)
    data = PhasedData(config, schedule)
    first = [data.at(0)[index].tokens for index in range(12)]
    second = [data.at(3)[index // 2].tokens for index in range(12, 28)]
    assert all((one == other).all() for one, other in zip(second[::2], second[1::2], strict=True))
    everything = numpy.concatenate([*first, *second[::2]])
    assert len(numpy.unique(everything)) == len(everything)


@pytest.mark.parametrize("format", ["chat", "preference"])
def test_conversations_at_another_length_are_those_that_were_not_read(tmp_path, format):
    """None of them is cut, none comes twice before the epoch has ended, and none is left out."""
    data = DataConfig(path=[write(tmp_path, format)], sequence_length=128, pad_to=4, split="1,0")
    (corpus,) = survey(data)
    ids = [*range(corpus.documents)]

    def documents(reading, first, end):
        found = [reading[index]["document_ids"].tolist() for index in range(first, end)]
        return [document for own in found for document in own if document >= 0]

    short = conversations(data, corpus, "train", 5, ())
    count = short.sequences_per_epoch
    for read in (3, count, count + 4):
        long = conversations(replace(data, sequence_length=384), corpus, "train", 5, ((128, read),))
        before = documents(short, count * (read // count), read)
        rest = documents(long, 0, long.left)
        assert sorted([*before, *rest]) == (ids if read % count else [])
        again = conversations(data, corpus, "train", 5, ((128, read), (384, 1)))
        if long.left:
            assert sorted([*before, *documents(long, 0, 1), *documents(again, 0, again.left)]) == ids
        next_epoch = documents(long, long.left, long.left + long.sequences_per_epoch)
        assert sorted(next_epoch) == ids
