"""Properties of packed sequences. Token = 1000 * document + position, so a token tells where it is from."""

import argparse
import collections
import hashlib
import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from llada_megatron.commands.data import add_arguments, run
from llada_megatron.config.errors import BadInput
from llada_megatron.config.schema import Config, DataConfig, EvaluationConfig, StageConfig
from llada_megatron.data import shards
from llada_megatron.data.fingerprint import fingerprint, fingerprint_difference
from llada_megatron.data.laid_out import LaidOut
from llada_megatron.data.packed import build_sequences
from llada_megatron.data.packing import permutation
from tests.distributed import forked

L = 16
MASK = 2**31 - 1


def write_corpus(prefix, lengths, first_document=0, token_of=lambda token: token):
    """A corpus without end-of-document tokens, straight from megatron-core's builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=numpy.int32)
    for document, length in enumerate(lengths, start=first_document):
        tokens = [token_of(1000 * document + position) for position in range(length)]
        builder.add_document(numpy.array(tokens, dtype=numpy.int32), [length])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def lengths_of(documents, seed=0):
    return numpy.random.default_rng(seed).integers(1, 60, documents).tolist()


def build(data, split="train", seed=5, mask_token_id=MASK, refuse_ids=True):
    return build_sequences(
        data,
        split=split,
        seed=seed,
        vocab_size=2**31,
        mask_token_id=mask_token_id,
        refuse_ids=refuse_ids,
    )


def folders_of(cache):
    """The folders of indices in a cache, which also remembers the range of ids."""
    return sorted(path for path in Path(cache).iterdir() if path.is_dir())


def tokens_of(sequences, count, first=0):
    return [sequences[index].tokens.tolist() for index in range(first, first + count)]


@pytest.fixture
def data(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", lengths_of(80))
    return DataConfig(path=[prefix], sequence_length=L, split="9,1")


@pytest.fixture
def blend(tmp_path):
    first = write_corpus(tmp_path / "first", lengths_of(80))
    second = write_corpus(tmp_path / "second", lengths_of(40, seed=1), first_document=1000)
    return DataConfig(path=[first, second], weights=[1.0, 3.0], sequence_length=L, split="9,1")


def test_boundaries_are_where_the_document_changes(data):
    sequences = build(data)
    for index in range(sequences.sequences_per_epoch):
        sample = sequences[index]
        changes = numpy.flatnonzero(numpy.diff(sample.tokens) != 1) + 1
        assert sample.cu_seqlens.tolist() == [0, *changes.tolist(), L]
        assert (sample.tokens.dtype, sample.tokens.shape) == (numpy.int64, (L,))
        assert sample.cu_seqlens.dtype == numpy.int32


def test_sequences_are_the_documents_laid_end_to_end(data):
    sequences = build(data)
    member = sequences.readings[0].whole
    assert isinstance(member, LaidOut)
    lengths = lengths_of(80)
    laid = [(document, token) for document in member.document_index for token in range(lengths[document])]
    assert sorted(member.document_index) == list(range(72))
    assert sequences.sequences_per_epoch == len(laid) // L
    for index, place in enumerate(member.shuffle_index.tolist()):
        piece = laid[place * L : (place + 1) * L]
        sample = sequences[index]
        assert sample.tokens.tolist() == [1000 * document + token for document, token in piece]
        starts = [0] + [i for i in range(1, L) if piece[i][0] != piece[i - 1][0]]
        assert sample.cu_seqlens.tolist() == [*starts, L]


def test_empty_documents_and_documents_that_end_at_a_cut_make_no_empty_piece(tmp_path):
    prefix = write_corpus(tmp_path / "corpus", [L, 0, L // 2, L // 2, 0, 2 * L, 3, L - 3] * 3)
    sequences = build(DataConfig(path=[prefix], sequence_length=L, split="1,0"))
    samples = [sequences[index] for index in range(sequences.sequences_per_epoch)]
    assert all((numpy.diff(sample.cu_seqlens) > 0).all() for sample in samples)
    assert sum(len(sample.tokens) for sample in samples) == 3 * 5 * L


def test_a_sample_depends_on_the_seed_and_the_index_alone(data):
    sequences = build(data)
    count = 3 * sequences.sequences_per_epoch
    forward = tokens_of(sequences, count)
    again = build(data)
    backward = [again[index].tokens.tolist() for index in reversed(range(count))][::-1]
    assert forward == backward
    assert forward != tokens_of(build(data, seed=6), count)


def test_every_epoch_holds_every_sequence_once_in_another_order(data):
    sequences = build(data)
    count = sequences.sequences_per_epoch
    epochs = [tokens_of(sequences, count, first=epoch * count) for epoch in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert len({str(sequence) for sequence in epochs[0]}) == count
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_of_a_later_epoch_is_fixed_for_ever(data):
    """A change of this list breaks the resume of running trainings."""
    sequences = build(data)
    count = sequences.sequences_per_epoch
    assert permutation(5, 1, count)[:8].tolist() == [10, 128, 135, 62, 95, 114, 132, 7]
    first, second = tokens_of(sequences, count), tokens_of(sequences, 8, first=count)
    assert second == [first[place] for place in (10, 128, 135, 62, 95, 114, 132, 7)]


def test_train_and_validation_share_no_document(data):
    seen = {}
    for split in ("train", "validation"):
        sequences = build(data, split)
        samples = tokens_of(sequences, sequences.sequences_per_epoch)
        seen[split] = {token // 1000 for tokens in samples for token in tokens}
    assert max(seen["train"]) < 72 <= min(seen["validation"])


def test_a_blend_honours_weights(blend):
    shares = collections.Counter(tokens[0] >= 1_000_000 for tokens in tokens_of(build(blend), 2000))
    assert abs(shares[True] - 1500) <= 2


def test_members_of_a_blend_pass_their_epochs_like_a_corpus_alone(blend):
    sequences = build(blend)
    alone = build(DataConfig(path=[blend.path[1]], sequence_length=L, split=blend.split))
    second = [tokens for tokens in tokens_of(sequences, 2000) if tokens[0] >= 1_000_000]
    assert len(second) > 3 * alone.sequences_per_epoch
    assert second == tokens_of(alone, len(second))


def test_a_blend_without_weights_follows_the_tokens(blend):
    blend.weights = []
    sequences = build(blend)
    tokens = [sum(lengths_of(80)[:72]), sum(lengths_of(40, seed=1)[:36])]
    drawn = sum(sample[0] < 1_000_000 for sample in tokens_of(sequences, 1000))
    assert abs(drawn - 1000 * tokens[0] / sum(tokens)) <= 2


def test_an_index_outside_is_refused(data):
    with pytest.raises(IndexError):
        build(data)[-1]


def test_a_sequence_with_the_mask_token_is_refused_by_prefix_and_document(data):
    sequences = build(data, mask_token_id=7000, refuse_ids=False)
    hits = []
    for index in range(sequences.sequences_per_epoch):
        try:
            sequences[index]
        except BadInput as error:
            hits.append(str(error))
    assert len(hits) == 1
    assert hits[0].startswith(f"{data.path[0]}: document 7 (counted from 0) contains the mask token 7000")


def test_indices_are_loaded_from_the_cache_and_rebuilt_for_another_corpus(data, tmp_path):
    before = tokens_of(build(data), 5)
    (directory,) = folders_of(tmp_path / "corpus.cache")
    times = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert tokens_of(build(data), 5) == before
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == times
    write_corpus(tmp_path / "corpus", lengths_of(80, seed=3))
    sequences = build(data)
    assert sequences.sequences_per_epoch == sum(lengths_of(80, seed=3)[:72]) // L
    assert len(folders_of(tmp_path / "corpus.cache")) == 2


def test_a_build_that_was_cut_off_is_not_trusted(data, tmp_path, monkeypatch):
    real_save = numpy.save

    def failing_save(path, *args, **kwargs):
        if "shuffle_index" in str(path):
            raise OSError(28, "No space left on device")
        real_save(path, *args, **kwargs)

    monkeypatch.setattr(numpy, "save", failing_save)
    with pytest.raises(BadInput, match=r"No space left on device\): set data.cache_dir"):
        build(data)
    monkeypatch.undo()
    assert not folders_of(tmp_path / "corpus.cache")
    build(data)


def test_the_index_command_builds_what_a_run_loads(blend, tmp_path, monkeypatch, capsys):
    config = Config(data=blend)
    config.schedule.stages = [StageConfig(name="a", block_size="full", tokens=100)]
    config.model.vocab_size, config.model.mask_token_id = 2**31, MASK
    config.evaluation = EvaluationConfig(block_sizes=["full"], sequences=20)
    monkeypatch.setattr("llada_megatron.config.compose.compose", lambda overrides: config)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert run(parser.parse_args(["index", "experiment=any"])) == 0
    assert "an epoch" in capsys.readouterr().out
    before = sorted(path.name for path in (tmp_path / "first.cache").iterdir())
    for split in ("train", "validation"):
        build(blend, split, seed=config.run.seed)
    assert sorted(path.name for path in (tmp_path / "first.cache").iterdir()) == before


def _read_in_a_group(rank, init_file, data, results):
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=2)
    sequences = build(data)
    results.put(hashlib.sha256(str(tokens_of(sequences, 100)).encode()).hexdigest())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_every_process_of_a_group_reads_the_same_sequences(blend, tmp_path):
    context = forked()
    results = context.Queue()
    processes = [
        context.Process(target=_read_in_a_group, args=(rank, tmp_path / "init", blend, results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    digests = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0
    assert digests == {hashlib.sha256(str(tokens_of(build(blend), 100)).encode()).hexdigest()}
    assert len(folders_of(f"{blend.path[0]}.cache")) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": []}, "data.path is empty"),
        ({"path": ["absent"]}, "absent.bin does not exist"),
        ({"weights": [1.0, 2.0]}, "data.weights must be positive numbers, one per entry of data.path"),
        ({"weights": [0.0]}, "data.weights must be positive"),
        ({"split": "99"}, "data.split='99' will not do: give two shares"),
        ({"split": "nan,1"}, "give two shares"),
        ({"split": "0,0"}, "give two shares"),
        ({"split": "0,1"}, "the train split holds 0 of 80 documents and 0 tokens.*data.split"),
        ({"sequence_length": 10**6}, "less than one sequence: change data.split.*data.sequence_length"),
        ({"sequence_length": 0}, "data.sequence_length must be at least 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(data, tmp_path, change, message):
    for name, value in change.items():
        setattr(data, name, value)
    with pytest.raises(BadInput, match=message):
        build(data)
    assert not [*tmp_path.glob("*.cache/*/")]


def test_a_corpus_of_another_tokenizer_is_refused(data):
    sidecar = {"tokenizer_sha256": "0", "tokenizer": "t.json", "vocab_size": 1, "tokens": 1, "bytes": 1}
    Path(f"{data.path[0]}.json").write_text(json.dumps(sidecar))
    with pytest.raises(BadInput, match=r"prepared with another tokenizer: set data.tokenizer to t\.json"):
        build(data)


def test_the_fingerprint_follows_the_content_and_not_the_place(data, tmp_path):
    saved = fingerprint(data)
    copy = tmp_path / "elsewhere"
    for suffix in ("bin", "idx"):
        shutil.copy(f"{data.path[0]}.{suffix}", f"{copy}.{suffix}")
    data.path = [str(copy)]
    assert fingerprint_difference(saved, fingerprint(data)) == []
    write_corpus(copy, lengths_of(80), token_of=lambda token: token + (token == 40_000))
    assert fingerprint_difference(saved, fingerprint(data)) == [
        "The .bin of data.path[0] has the same size and other content."
    ]


def test_the_fingerprint_names_every_setting_that_changed(data, blend):
    saved = fingerprint(data)
    blend.split, blend.sequence_length = "8,2", 32
    blend.path[0] = write_corpus(Path(blend.path[0]).with_name("longer"), lengths_of(81))
    sentences = " ".join(fingerprint_difference(saved, fingerprint(blend)))
    for words in (
        "data.path had 1 corpora and has 2 now.",
        "The .bin of data.path[0] had",
        "The .idx of data.path[0] had",
        "data.weights was [] and is [1.0, 3.0] now.",
        "data.split was 9,1 and is 8,2 now.",
        "data.sequence_length was 16 and is 32 now.",
    ):
        assert words in sentences


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MIB", 16)
    path = tmp_path / "large"
    content = bytearray(range(256)) * 40
    path.write_bytes(content)
    whole = shards.sampled_sha256(str(path))
    changes = 0
    for offset in (0, 15, len(content) - 1):
        content[offset] ^= 1
        path.write_bytes(content)
        changes += shards.sampled_sha256(str(path)) != whole
        content[offset] ^= 1
    assert changes == 3


def test_an_id_outside_the_vocabulary_is_found_before_any_index_is_built(data):
    with pytest.raises(
        BadInput, match=r"corpus\.bin: document 50 \(counted from 0\) holds the id 50000 at its"
    ):
        build_sequences(data, split="train", seed=5, vocab_size=50_000, mask_token_id=MASK)
    assert not folders_of(f"{data.path[0]}.cache")


def test_announced_sequences_are_read_by_a_thread_and_are_the_same(data):
    expected, sequences = tokens_of(build(data), 40), build(data)
    sequences.announce(range(20))
    assert tokens_of(sequences, 20) == expected[:20]
    assert sequences[3] is sequences[3]  # kept for whoever reads it again
    sequences.announce(range(10, 40))
    assert tokens_of(sequences, 40) == expected
    assert sequences[3] is not sequences[3]


def test_a_file_that_is_cut_off_meanwhile_is_named(data):
    sequences = build(data)
    with open(f"{data.path[0]}.bin", "r+b") as file:
        file.truncate(8)
    with pytest.raises(BadInput, match=r"corpus\.bin ends before byte \d+: it was cut off"):
        tokens_of(sequences, 20)
