"""The objective of Levenshtein labels: what drafts are, what is taught of chats, and every layout alike."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from llada_megatron.attention.mask import block_starts
from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.errors import BadInput
from llada_megatron.config.levenshtein import LevenshteinConfig
from llada_megatron.config.schema import BlockGrid, Config
from llada_megatron.data.packed import BadSample, PackedSample
from llada_megatron.objectives.alignment import edit_labels
from llada_megatron.objectives.levenshtein import Draft, Kind, Levenshtein, first_turns, spoiled
from tests.distributed import run_ranks
from tests.objectives import conversations
from tests.objectives.edits import obeyed_together
from tests.objectives.mutants import differs, run_mutants
from tests.objectives.test_post_training import LAYOUTS, trained
from tests.training.runs import comparable, train

L, BLOCK, MASK, DELETE, SPLIT = 64, 8, 257, 300, 301
ORDERS = [f"levenshtein.delete_token_id={DELETE}", f"levenshtein.split_token_id={SPLIT}"]
STAGE = "schedule.stages=[{name: lev, block_size: '8', tokens: 1024, objective: levenshtein}]"
PARITY = ["experiment=parity", f"data.sequence_length={L}", "optimizer.warmup_tokens=0", STAGE]
PLAIN = PackedSample(np.random.default_rng(0).integers(0, 250, L), np.array([0, 21, L], np.int32))
TAUGHT = np.zeros(L, bool)
TAUGHT[3:13] = TAUGHT[18:20] = TAUGHT[22:23] = TAUGHT[40:64] = True
CHAT = replace(PLAIN, supervised=TAUGHT, cu_seqlens=np.array([0, 24, L], np.int32))


def objective_of(*overrides: str) -> tuple[Levenshtein, Config]:
    config = compose([*PARITY, *ORDERS, *overrides])
    return Levenshtein("levenshtein", config, rules.check(config)), config


def drafts(sample: PackedSample, count: int, *overrides: str) -> list[Draft]:
    objective, _ = objective_of(*overrides)
    return [objective.draft(index, sample, objective.schedule.stages[0]) for index in range(count)]


def rows_of(sample: PackedSample, draft: Draft, *of: np.ndarray) -> list[tuple[np.ndarray, ...]]:
    """The taught tokens of each block, of each of the arrays [L]."""
    starts = block_starts(sample.cu_seqlens, BLOCK, BlockGrid.sequence)
    blocks = [np.flatnonzero(draft.is_taught & (starts == start)) for start in np.unique(starts)]
    return [tuple(each[places] for each in of) for places in blocks if len(places)]


@pytest.mark.parametrize("sample", [PLAIN, CHAT], ids=["text", "chat"])
def test_labels_of_drafts_are_those_that_make_the_text(sample: PackedSample) -> None:
    mends = 0
    for draft in drafts(sample, 30):
        for read, labels, text in rows_of(sample, draft, draft.tokens, draft.labels, sample.tokens):
            now = read[None]
            assert (labels == edit_labels(now, text[None], DELETE, SPLIT)[0]).all()
            for _ in range(BLOCK):
                orders = edit_labels(now, text[None], DELETE, SPLIT)
                orders = np.where(orders == DELETE, 5001, np.where(orders == SPLIT, 5002, orders))
                now = obeyed_together(now, orders)
                now = np.where(now == 5000, MASK, now)
            assert (now[0] == text).all()
            mends += int(np.isin(labels, [DELETE, SPLIT]).sum())
    assert mends > 50


def test_without_wrong_tokens_it_is_diffusion_and_what_is_visible_is_kept() -> None:
    from llada_megatron.objectives.diffusion import Diffusion

    none = [f"levenshtein.{name}=0" for name in ("deleted", "inserted", "substituted", "visible_weight")]
    objective, config = objective_of(*none)
    stage, data = objective.schedule.stages[0], {3: PLAIN, 4: CHAT}
    mine = objective.batch(data, [3, 4], stage, noise_sigma=0.1)
    with_masks = Diffusion("diffusion", config, objective.schedule).batch(data, [3], stage, noise_sigma=0.1)
    assert torch.equal(mine.inputs.tokens[:1], with_masks.inputs.tokens)
    assert torch.equal(mine.inputs.noise.rows[0], with_masks.inputs.noise.rows[0])
    own = mine.inputs.outputs % 2 == 0
    is_masked = mine.rows["loss_by_label"][own] == Kind.masked
    for found, expected in (
        (mine.rows["weights"], with_masks.rows["weights"]),
        (mine.inputs.labels, with_masks.inputs.labels),
    ):
        assert torch.equal(found[own][is_masked], expected)
    assert (mine.rows["weights"][own][~is_masked] == 0).all()
    assert set(mine.rows["loss_by_label"].tolist()) == {Kind.masked, Kind.keep}


def test_drafts_are_spoiled_in_the_shares_of_the_settings() -> None:
    text = np.tile(np.arange(L), (300, 1))  # no token is there twice
    everywhere = np.ones(text.shape, bool)

    def share_of(order: int, **shares: float) -> float:
        none = {"deleted": 0.0, "inserted": 0.0, "substituted": 0.0}
        settings = LevenshteinConfig(DELETE, SPLIT, **(none | shares))
        draws = np.random.default_rng(0)
        draft = spoiled(text, everywhere, ~everywhere, np.arange(L, 2 * L), settings, MASK, draws)
        if order == MASK:
            return float((draft == MASK).mean())
        labels = edit_labels(draft, text, DELETE, SPLIT)
        return float((labels == order).mean() if order else ((labels != draft) & (labels < MASK)).mean())

    assert share_of(MASK, deleted=0.1) == pytest.approx(0.1, abs=0.01)
    assert share_of(0, substituted=0.2) == pytest.approx(0.2, abs=0.01)
    assert share_of(DELETE, inserted=0.25) == pytest.approx(0.2, abs=0.01)  # of what stays in the block
    assert share_of(SPLIT, deleted=0.1) == pytest.approx(0.1 * 0.9 * 0.9, abs=0.01)  # runs, none at the end


def test_visible_tokens_weigh_as_the_settings_say() -> None:
    objective, _ = objective_of("levenshtein.visible_weight=0.5")
    batch = objective.batch({0: PLAIN, 1: CHAT}, [0, 1], objective.schedule.stages[0])
    is_masked = batch.rows["loss_by_label"] == Kind.masked
    assert (batch.rows["weights"][~is_masked] - 0.5).abs().max() < 1e-6
    assert (batch.rows["weights"][is_masked] >= 1).all() and batch.counts == (2 * L - 28,)


def test_of_a_block_with_several_turns_the_first_is_taught_and_the_rest_hidden() -> None:
    starts = block_starts(CHAT.cu_seqlens, BLOCK, BlockGrid.sequence)
    is_taught, is_hidden = first_turns(starts, TAUGHT)
    runs = [(a, b) for a, b in ((3, 13), (18, 20), (40, 64))]
    expected = np.zeros(L, bool)
    for a, b in runs:
        expected[a:b] = True
    assert (is_taught == expected).all()
    assert np.flatnonzero(is_hidden).tolist() == [13, 14, 15, *range(20, 24)]  # 22 is a later turn's
    for draft in drafts(CHAT, 5):
        assert (draft.tokens[is_hidden] == MASK).all()
        given = ~is_taught & ~is_hidden
        assert (draft.tokens[given] == CHAT.tokens[given]).all()


def test_a_draft_is_the_same_in_any_micro_batch_and_order() -> None:
    objective, _ = objective_of("diffusion.complementary=true", "diffusion.mask_rate_max=0.9")
    stage, data = objective.schedule.stages[0], {0: PLAIN, 1: CHAT, 2: PLAIN}
    together = objective.batch(data, [5, 2, 3, 0], stage)
    for row, index in enumerate([5, 2, 3, 0]):
        assert together.digest(row) == objective.batch(data, [index], stage).digest(0)
    assert together.digest(0) != objective.batch(data, [4], stage).digest(0)


def test_text_that_holds_an_order_is_refused_or_left_out() -> None:
    text = replace(PLAIN, tokens=np.where(np.arange(L) == 30, SPLIT, PLAIN.tokens))
    objective, _ = objective_of()
    with pytest.raises(BadSample, match="holds token 301, which is an order in levenshtein"):
        objective.batch({0: text}, [0], objective.schedule.stages[0])
    objective, _ = objective_of("training.bad_samples=skip")
    batch = objective.batch({0: text, 1: PLAIN}, [0, 1], objective.schedule.stages[0])
    assert batch.counts == (L,) and set((batch.inputs.outputs % 2).tolist()) == {1}
    assert "an order" in objective.left_out[0]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            [],
            r"levenshtein\.delete_token_id=0 and split_token_id=0 must be two rows of model\.vocab_size=512",
        ),
        ([ORDERS[0], f"levenshtein.split_token_id={MASK}"], r"must be two rows of .* which no text has"),
        ([ORDERS[0], "levenshtein.split_token_id=512"], r"must be two rows of model\.vocab_size=512"),
        ([*ORDERS, "levenshtein.deleted=0.6", "levenshtein.substituted=0.6"], "are more than all tokens"),
    ],
)
def test_orders_without_rows_of_their_own_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        rules.check(compose([*PARITY, *overrides]))


# Runs


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return conversations.write(tmp_path_factory.mktemp("conversations"), "chat")


def configure(chats: str, *overrides: str) -> Config:
    stage = STAGE.replace("1024", str(16 * conversations.L))
    return conversations.configure(chats, "sft", stage, *ORDERS, "levenshtein.inserted=0.2", *overrides)


MORE = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.full]) for name in LAYOUTS if name != "cp2"]


@pytest.fixture(scope="module")
def straight(chats) -> dict:
    return run_ranks(trained, configure(chats))[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["cp2", *MORE])
def test_every_layout_trains_the_same(chats, straight, layout) -> None:
    config = configure(chats, *LAYOUTS[layout])
    for found in run_ranks(trained, config, processes=config.layout.processes):
        assert not differs(found, straight)
        for ours, expected in zip(found["figures"], straight["figures"], strict=True):
            assert ours["loss_by_label"] == pytest.approx(expected["loss_by_label"], rel=1e-4)


# Each mutation breaks one rank's arithmetic as a plausible bug would.


@contextmanager
def labels_of_another_row():
    """Rank 1 takes its rows, and the labels of the rows before them."""
    from llada_megatron.training import step

    part_of = step.context_part

    def wrong(batch):
        part = part_of(batch)
        part.inputs.labels = part.inputs.labels.roll(torch.distributed.get_rank())
        return part

    with mock.patch.object(step, "context_part", wrong):
        yield


@contextmanager
def drafts_of_the_rank():
    from llada_megatron.objectives import levenshtein

    real = levenshtein.generator

    def generator(seed, *names):
        return real(seed + torch.distributed.get_rank(), *names)

    with mock.patch.object(levenshtein, "generator", generator):
        yield


MUTATIONS = [labels_of_another_row, drafts_of_the_rank]


@pytest.mark.slow
def test_the_comparison_of_layouts_fails_for_every_deliberate_error(chats, straight) -> None:
    mutants = [(mutation, configure(chats, *LAYOUTS["cp2"])) for mutation in MUTATIONS]
    for mutation, found in zip(MUTATIONS, run_mutants(trained, mutants), strict=True):
        assert differs(found, straight), mutation.__name__


@pytest.mark.slow
@pytest.mark.full
def test_a_resumed_run_is_equal_bit_for_bit(chats, tmp_path: Path) -> None:
    once, twice = (configure(chats, f"run.dir={tmp_path}/{name}") for name in ("once", "twice"))
    train(once)
    train(configure(chats, f"run.dir={tmp_path}/twice", "training.steps=1"), twice)
    assert comparable(tmp_path / "once") == comparable(tmp_path / "twice")
