"""Noise groups of several blocks: layouts and rates against the paper's steps, and the objective in a run."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.attention.mask import block_starts
from llada_megatron.config import rules
from llada_megatron.config.choices import GroupRates
from llada_megatron.config.multi_block import MultiBlockConfig
from llada_megatron.config.schema import BlockGrid, Config, DiffusionConfig
from llada_megatron.data.packed import build_sequences
from llada_megatron.objectives.diffusion import Diffusion
from llada_megatron.objectives.multi_block import MultiBlock, chain_rates, corrupt_in_groups, group_starts
from tests.distributed import run_ranks
from tests.objectives import conversations
from tests.objectives.conversations import BLOCK, L, write
from tests.objectives.mutants import differs, run_mutants
from tests.objectives.test_mistakes import first_step
from tests.objectives.test_post_training import LAYOUTS, trained
from tests.training.runs import arrays_in, checkpoint, comparable, records, train

T = 48  # tokens of a sequence where nothing is trained
ALONE = ["diffusion.multi_block.group_size=1", "diffusion.multi_block.rates=independent"]
GROUPS = [f"diffusion.multi_block.{each}" for each in ("group_size=3", "random_layouts=3")]


@st.composite
def boundaries(draw):
    cuts = draw(st.sets(st.integers(1, T - 1), max_size=6))
    return np.array([0, *sorted(cuts), T], dtype=np.int32)


def sizes_of(starts, cu_seqlens, block_start):
    """Blocks of each group, by document."""
    firsts = np.unique(block_start)
    return [
        [
            int(((firsts >= group) & (firsts < following)).sum())
            for group, following in pairwise([*np.unique(starts[start:stop]), stop])
        ]
        for start, stop in pairwise(cu_seqlens.tolist())
    ]


@given(
    cu_seqlens=boundaries(),
    block_size=st.sampled_from([1, 3, 4]),
    grid=st.sampled_from(BlockGrid),
    size=st.integers(1, 5),
    data=st.data(),
)
def test_groups_are_the_papers_layouts_in_every_document(cu_seqlens, block_size, grid, size, data):
    block_start = block_starts(cu_seqlens, block_size, grid)
    shift = data.draw(st.integers(0, size - 1) | st.none())
    layout = None if shift is None else (size, shift)
    largest = max(size, 2)
    starts = group_starts(cu_seqlens, block_start, layout, largest, np.random.default_rng(0))
    assert (starts <= block_start).all() and np.isin(starts, block_start).all()
    found = sizes_of(starts, cu_seqlens, block_start)
    blocks = [len(np.unique(block_start[a:b])) for a, b in pairwise(cu_seqlens.tolist())]
    assert [sum(sizes) for sizes in found] == blocks
    for sizes, count in zip(found, blocks, strict=True):
        if layout is None:
            assert all(2 <= each <= largest for each in sizes[:-1]) and 1 <= sizes[-1] <= largest
        else:
            whole = [shift] * (shift > 0) + [size] * count
            edges = np.minimum(np.cumsum(whole), count)
            assert sizes == np.diff(np.unique(np.append(0, edges))).tolist()


def test_every_pair_of_neighbours_and_every_place_in_a_group_occurs_among_the_systematic_layouts():
    settings = MultiBlockConfig(group_size=3)
    assert settings.layouts == [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    assert len(MultiBlockConfig(group_size=4, random_layouts=2).layouts) == 2 + 3 + 4 + 2
    assert MultiBlockConfig(group_size=4, systematic=False, random_layouts=2).layouts == [None, None]
    blocks = np.arange(12)
    groups = [
        group_starts(np.array([0, 12]), blocks, layout, 3, np.random.default_rng(0))
        for layout in settings.layouts
    ]
    for size in (2, 3):
        of_size = [starts for starts, (each, _) in zip(groups, settings.layouts, strict=True) if each == size]
        for block in range(size, 10):
            assert {int(block - starts[block]) for starts in of_size} == set(range(size))


def test_chain_rates_are_the_papers_chain():
    low, high, group_K = 0.2, 0.9, np.array([0, 0, 0, 12, 16, 16, 24])
    found = chain_rates(group_K, low, high, np.random.default_rng(3))
    draws = np.random.default_rng(3)
    floors, factors = 1 - draws.random(7), 1 - draws.random(7)
    for block, group in enumerate(group_K):
        if block == 0 or group_K[block - 1] != group:
            floor = high - floors[block] * (high - low)  # U(low, high)
        floor = high - factors[block] * (high - floor)  # U(floor, high), and the next one's floor
        assert found[block] == pytest.approx(floor, rel=1e-12)


@pytest.mark.parametrize(("systematic", "random"), [(True, 0), (False, 3)])
def test_the_mean_rate_is_that_of_the_draws(systematic, random):
    settings = MultiBlockConfig(4, systematic, random, rate_margin=0.1)
    low, high, blocks = 0.1, 0.8, np.arange(4000)
    drawn = []
    for index, layout in enumerate(settings.layouts):
        starts = group_starts(np.array([0, 4000]), blocks, layout, 4, np.random.default_rng(index))
        rates = chain_rates(starts, low, high - 0.1 * (high - low), np.random.default_rng(index))
        assert low <= rates.min() and rates.max() <= 0.73 + 1e-12
        assert all((np.diff(rates)[starts[1:] == starts[:-1]]) >= 0)
        drawn.append(rates.mean())
    assert settings.mean_rate(low, high) == pytest.approx(np.mean(drawn), abs=0.01)
    assert replace(settings, rates=GroupRates.independent).mean_rate(low, high) == pytest.approx(0.45)


@given(cu_seqlens=boundaries(), grid=st.sampled_from(BlockGrid), sample=st.integers(0, 1000))
def test_of_each_block_the_rates_share_of_the_supervised_tokens_is_masked(cu_seqlens, grid, sample):
    diffusion = DiffusionConfig(block_grid=grid, multi_block=MultiBlockConfig(3))
    supervised = np.random.default_rng(sample).random(T) < 0.7
    made = corrupt_in_groups(1, sample, cu_seqlens, 8, diffusion, supervised)
    assert not (made.masked & ~supervised).any()
    starts = block_starts(cu_seqlens, 8, grid)
    for start in np.unique(starts):
        here = starts == start
        tokens, masked = int((supervised & here).sum()), int((made.masked & here).sum())
        assert len(np.unique(made.rate[here])) == 1
        assert masked == pytest.approx(made.rate[here][0] * tokens) and (masked < tokens or not tokens)
    again = corrupt_in_groups(1, sample, cu_seqlens, 8, diffusion, supervised)
    assert (again.masked == made.masked).all()
    assert (corrupt_in_groups(2, sample, cu_seqlens, 8, diffusion).rate != made.rate).any()


def test_masked_positions_are_spread_evenly_over_a_block():
    diffusion = DiffusionConfig(multi_block=MultiBlockConfig(2))
    made = [corrupt_in_groups(1, index, np.array([0, 16]), 8, diffusion).masked for index in range(4000)]
    share = np.mean(made, axis=0)
    assert (share[8:] > share[:8].max()).all()  # the second block is noisier: of every other sample
    for half in (share[:8], share[8:]):
        assert np.ptp(half) < 6 * 0.5 / np.sqrt(len(made))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("chats"), "chat")


def configure(corpus: str, *overrides: str, objective: str = "multi_block", steps: int = 2) -> Config:
    stage = f"{{name: a, block_size: '{BLOCK}', tokens: {8 * steps * L}, objective: {objective}}}"
    return conversations.configure(
        corpus, "sft", "diffusion.complementary=false", f"schedule.stages=[{stage}]", *overrides
    )


def samples(config: Config, kind: type[Diffusion], indices: list[int], **changes: Any):
    schedule = rules.check(config)
    data = build_sequences(
        config.data,
        split="train",
        seed=config.run.seed,
        vocab_size=config.model.vocab_size,
        mask_token_id=config.model.mask_token_id,
    )
    made = kind(schedule.stages[0].objective, config, schedule)
    sequences = {index: replace(data[index], **changes) for index in made.sequences(indices)}
    return sequences, made.batch(sequences, indices, schedule.stages[0])


@pytest.mark.parametrize("grid", list(BlockGrid))
def test_groups_of_one_block_make_the_diffusion_objectives_batch(chats, grid):
    overrides = [f"diffusion.block_grid={grid}", "diffusion.t_per=block"]
    _, plain = samples(configure(chats, *overrides, objective="diffusion"), Diffusion, [0, 1, 2])
    _, grouped = samples(configure(chats, *overrides, *ALONE), MultiBlock, [0, 1, 2])
    assert [plain.digest(i) for i in range(3)] == [grouped.digest(i) for i in range(3)]
    assert plain.counts == grouped.counts
    masks = plain.inputs.keys.mask, grouped.inputs.keys.mask
    assert all(torch.equal(masks[0].dense(i), masks[1].dense(i)) for i in range(3))


def test_samples_in_a_row_read_one_sequence_under_each_layout_and_learn_its_answers_alone(chats):
    config = configure(chats, *GROUPS)
    sequences, batch = samples(config, MultiBlock, [*range(8)])
    assert list(sequences) == [0]
    starts = batch.inputs.keys.mask.group_starts
    assert len({row.tobytes() for row in starts}) == 8
    token = batch.inputs.outputs.numpy() // 8
    assert (token < L).all() and sequences[0].supervised[token].all()
    assert (batch.inputs.labels.numpy() == sequences[0].tokens[token]).all()
    _, alone = samples(config, MultiBlock, [2])
    assert alone.digest(0) == batch.digest(2)
    _, left_out = samples(config, MultiBlock, [0, 1], is_left_out=True)
    assert len(left_out.inputs.outputs) == 0 and left_out.counts == (0,)


def trained_both(*configs: Config) -> list[dict[str, Any]]:
    from llada_megatron.parallel import groups

    found = []
    for config in configs:
        found.append(trained(config))
        groups.destroy()
    return found


@pytest.mark.slow
def test_groups_of_one_block_train_bit_for_bit_as_the_diffusion_objective(chats):
    noise = "diffusion.embedding_noise={sigma_over_rms: 0.5, fade_tokens: 100000}"
    plain = configure(chats, noise, objective="diffusion")
    [[found, expected]] = run_ranks(trained_both, configure(chats, noise, *ALONE), plain)
    assert found == expected


@pytest.fixture(scope="module")
def straight(chats) -> dict[str, Any]:
    return run_ranks(trained, configure(chats, *GROUPS))[0]


MORE = [pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS if name != "cp2"]


@pytest.mark.parametrize("layout", ["cp2", *MORE])
def test_every_layout_trains_the_same(chats, straight, layout):
    config = configure(chats, *GROUPS, *LAYOUTS[layout])
    for found in run_ranks(trained, config, processes=config.layout.processes):
        assert not differs(found, straight)


# Each mutation breaks one rank's arithmetic as a plausible bug would.


@contextmanager
def groups_cut_in_two():
    """Tokens are dealt in pieces of blocks, so that groups lie on several ranks: slower, and not wrong."""
    from llada_megatron.attention import context

    deal = context.deal_tokens

    def wrong(work_L, group_start_L, block_size, ranks):
        return deal(work_L, np.arange(len(work_L)), block_size // 2, ranks)

    with mock.patch.object(context, "deal_tokens", wrong):
        yield


@contextmanager
def halo_mixed_up_behind_the_first_block():
    """Of a group that is cut, noisy keys behind its first block are taken for the first that travels."""
    from llada_megatron.attention.context import ContextShard

    slot_of = ContextShard._halo_slot.func

    def wrong(shard):
        return np.where(shard.mask.group_start == shard.mask.block_start, slot_of(shard), 0)

    with groups_cut_in_two(), mock.patch.object(ContextShard, "_halo_slot", property(wrong)):
        yield


@contextmanager
def groups_of_another_sample():
    """Rank 1 gives each sample the groups of its neighbour, which reads the same sequence."""
    from llada_megatron.objectives import diffusion

    real = diffusion.diffusion_inputs

    def wrong(*args, group_starts, **options):
        turned = group_starts[::-1] if torch.distributed.get_rank() else group_starts
        return real(*args, group_starts=turned, **options)

    with mock.patch.object(diffusion, "diffusion_inputs", wrong):
        yield


MUTATIONS = [
    (groups_cut_in_two, "cp2", False),
    (halo_mixed_up_behind_the_first_block, "cp2", True),
    (groups_of_another_sample, "dp2", True),
]


@pytest.mark.slow
def test_the_comparison_of_layouts_fails_for_every_deliberate_error(chats, straight):
    mutants = [(mutation, configure(chats, *GROUPS, *LAYOUTS[layout])) for mutation, layout, _ in MUTATIONS]
    found = run_mutants(trained, mutants)
    for (mutation, _, is_wrong), measured in zip(MUTATIONS, found, strict=True):
        assert differs(measured, straight) == is_wrong, mutation.__name__


class ByPlace(MultiBlock):
    """The layout of a sample is that of its place in the micro-batch."""

    def batch(self, data: Any, indices: list[int], stage: Any, **options: Any) -> Any:
        place = iter(range(len(indices)))
        self.corrupt = lambda seed, index, *rest: corrupt_in_groups(seed, next(place), *rest)  # type: ignore
        return super().batch(data, indices, stage, **options)


@pytest.mark.full
@pytest.mark.parametrize(("objective", "is_right"), [(MultiBlock, True), (ByPlace, False)])
def test_micro_batches_change_nothing(chats, objective, is_right):
    found = [
        run_ranks(first_step, configure(chats, *GROUPS, f"layout.micro_batch={size}"), objective)[0]
        for size in (2, 8)
    ]
    far = max(abs(a - b) / abs(b) for a, b in zip(*found, strict=True))
    assert (far < 1e-5) == is_right and (far > 1e-3) != is_right, far


@pytest.mark.full
def test_a_resumed_run_is_equal_bit_for_bit(chats, tmp_path):
    def run(folder: Path, *overrides: str) -> Config:
        options = ["evaluation.block_sizes=['8']", "evaluation.sequences=2", "evaluation.draws=1"]
        options += ["training.threads=1", f"run.dir={folder}", *overrides]
        return configure(chats, *GROUPS, *options, steps=4)

    train(run(tmp_path / "straight"))
    train(run(tmp_path / "resumed", "training.steps=2"), run(tmp_path / "resumed"))
    folders = [tmp_path / name for name in ("straight", "resumed")]
    found, expected = map(comparable, folders)
    assert len(found) == 4 and found == expected
    assert len(records(folders[0], "evaluations")) == 1
    found, expected = run_ranks(arrays_in, [checkpoint(folder, 4) for folder in folders])[0]
    assert found and found == expected
