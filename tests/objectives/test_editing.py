"""Wrong tokens among what a model reads, its own drafts and drawn ones: what is read, learnt and counted."""

from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from llada_megatron.config import rules
from llada_megatron.config.compose import compose
from llada_megatron.config.flops import supervised_per_sequence
from llada_megatron.config.rules import schedule_of
from llada_megatron.data.packed import PackedSample
from llada_megatron.objectives.diffusion import RATE_BINS, Diffusion
from llada_megatron.objectives.editing import KEPT, MASKED, REPLACED, Editing
from llada_megatron.objectives.oput import DRAFTED, Oput
from tests.distributed import run_ranks
from tests.objectives.conversations import BLOCK, configure, write
from tests.objectives.mutants import differs, run_mutants

L, MASK = 128, 257
SAMPLES = {
    index: PackedSample(
        np.random.default_rng(index).integers(0, 256, L),
        np.array([0, 50, L], dtype=np.int32),
        supervised=np.arange(L) % 5 > 0,
        is_left_out=index == 3,
    )
    for index in range(8)
}
OBJECTIVES = {"editing": Editing, "oput": Oput, "diffusion": Diffusion}


def made(name: str, *overrides: str) -> tuple[Any, Any]:
    """An objective and the stage of blocks of 8 that it trains."""
    stage = f"schedule.stages=[{{name: a, block_size: '8', tokens: 1024, objective: {name}}}]"
    config = compose(
        ["experiment=parity", f"model.mask_token_id={MASK}", "diffusion.t_per=block", stage, *overrides]
    )
    schedule = schedule_of(config)
    objective = OBJECTIVES[name](name, config, schedule)
    objective.read = lambda data, indices: [data[index] for index in indices]
    return objective, schedule.stages[0]


@pytest.mark.parametrize("kept_weight", [0.0, 0.25])
@pytest.mark.parametrize("words", ["text", "vocabulary"])
def test_wrong_tokens_stand_among_the_visible_ones_and_are_learnt(words, kept_weight):
    settings = [f"diffusion.editing.{each}" for each in (f"words={words}", "vocabulary=200", "weight=3")]
    objective, stage = made(
        "editing", *settings, f"diffusion.editing.kept_weight={kept_weight}", "diffusion.editing.replaced=0.3"
    )
    plain, _ = made("diffusion")
    counted = np.zeros(3)
    for index, sample in SAMPLES.items():
        batch, masked = (one.batch(SAMPLES, [index], stage) for one in (objective, plain))
        read, clean = batch.inputs.tokens[0, :L].numpy(), sample.tokens
        assert (batch.inputs.tokens[0, L:].numpy() == clean).all()
        is_masked = masked.inputs.tokens[0, :L].numpy() == MASK
        assert ((read == MASK) == is_masked).all()
        is_wrong = (read != clean) & ~is_masked
        maskable = sample.supervised & (not sample.is_left_out)
        assert not is_wrong[~maskable].any()
        allowed = clean[maskable] if words == "text" else np.arange(200)
        assert np.isin(read[is_wrong], allowed).all()
        learnt = maskable if kept_weight else is_masked | is_wrong
        assert (batch.inputs.outputs.numpy() == np.flatnonzero(learnt)).all()
        assert (batch.inputs.labels.numpy() == clean[learnt]).all()
        stands = np.where(is_masked, MASKED, np.where(is_wrong, REPLACED, KEPT))[learnt]
        assert (batch.rows["stands"].numpy() == stands).all()
        weights = np.array([np.nan, 3, kept_weight])[stands]
        weights[stands == MASKED] = masked.rows["weights"]
        assert np.allclose(batch.rows["weights"], weights) and batch.counts == masked.counts
        bins = batch.rows["loss_by_t"].numpy()
        assert (bins[stands == MASKED] == masked.rows["loss_by_t"].numpy()).all()
        assert (bins[stands != MASKED] == RATE_BINS).all()
        counted += [is_masked.sum(), is_wrong.sum(), (maskable & ~is_masked).sum()]
    assert 0.2 < counted[1] / counted[2] < 0.4


def test_a_batch_is_a_function_of_seed_and_sample():
    objective, stage = made("editing")
    together = objective.batch(SAMPLES, [5, 1, 6], stage)
    other, _ = made("editing", "run.seed=9")
    for row, index in enumerate([5, 1, 6]):
        alone = objective.batch(SAMPLES, [index], stage)
        assert together.digest(row) == alone.digest(0)
        assert other.batch(SAMPLES, [index], stage).digest(0) != alone.digest(0)


def truth(batch: Any) -> torch.Tensor:
    """What a model that is always right drafts."""
    return torch.stack([batch.inputs.labels.double(), torch.ones(len(batch.inputs.labels)).double()], dim=-1)


@pytest.mark.parametrize("turns", [1, 3])
def test_with_true_drafts_the_noisy_half_is_clean_and_every_token_is_learnt(turns):
    objective, stage = made("oput", f"diffusion.oput.turns={turns}")
    indices, draft = [5, 3, 6], None
    for _ in range(objective.draft_turns):
        first = objective.draft_batch(SAMPLES, indices, stage, draft=draft)
        assert draft is None or torch.equal(first.inputs.tokens[:, :L], first.inputs.tokens[:, L:])
        draft = truth(first)
    batch = objective.batch(SAMPLES, indices, stage, draft=draft)
    clean = torch.from_numpy(np.stack([SAMPLES[index].tokens for index in indices]))
    assert torch.equal(batch.inputs.tokens, torch.cat([clean, clean], dim=1))
    learnt = np.stack([SAMPLES[i].supervised & (not SAMPLES[i].is_left_out) for i in indices])
    padded = torch.zeros(L, 3, dtype=torch.bool).flatten()
    padded[batch.inputs.outputs] = True
    assert (padded.view(L, 3).T.numpy() == learnt).all()
    assert (batch.rows["weights"] == 1).all() and batch.counts == (int(learnt.sum()),)
    cross_entropy = torch.rand(len(batch.inputs.outputs))
    found = objective.loss(batch, cross_entropy)
    assert torch.isclose(found.sums[0], cross_entropy.sum())  # the loss of clean text
    bins, right = found.figures["right"]
    assert right.all() and (bins == DRAFTED).sum() == len(draft)


def test_a_share_of_the_samples_reads_wrong_drafts_and_the_others_masks():
    objective, stage = made("oput", "diffusion.oput.drafted=0.5")
    masked, drafted = 0, 0
    for index in (0, 1, 2, 4, 5, 6, 7):
        first = objective.draft_batch(SAMPLES, [index], stage)
        wrong = truth(first)
        wrong[:, 0] = (wrong[:, 0] + 1) % 256
        batch = objective.batch(SAMPLES, [index], stage, draft=wrong)
        at = first.inputs.outputs
        read = batch.inputs.tokens[0, :L]
        is_mask, is_draft = (read[at] == MASK).all(), (read[at] == wrong[:, 0]).all()
        assert is_mask or is_draft
        masked, drafted = masked + int(is_mask), drafted + int(is_draft)
        others = np.setdiff1d(np.arange(L), at)
        assert (read[others].numpy() == SAMPLES[index].tokens[others]).all()
    assert masked and drafted


@pytest.mark.parametrize(
    ("name", "settings", "share"),
    [
        ("editing", [], 1.0),
        ("editing", ["diffusion.editing.kept_weight=0"], 0.5 + 0.5 * 0.1),
        ("oput", ["diffusion.oput.turns=2"], 1.0),
    ],
)
def test_the_plan_knows_rows_and_passes(name, settings, share):
    objective, stage = made(name, "diffusion.mask_rate_min=0.25", "diffusion.mask_rate_max=0.75", *settings)
    assert supervised_per_sequence(objective.config, stage) == pytest.approx(L * share)
    passes = {"editing": 0, "oput": objective.draft_turns}[name]
    assert stage.geometry.passes_before(objective.config, 3) == passes


# The whole step, in layouts.

SETTINGS = {
    "editing": ["diffusion.editing.replaced=0.2", "diffusion.editing.kept_weight=0.1"],
    "oput": ["diffusion.oput.turns=2", "diffusion.oput.drafted=0.7"],
}
LAYOUTS = {
    "pp2 cp2": ["layout.pp=2", "layout.cp=2"],
    "dp2": ["layout.processes=2"],
    "micro_batch 1": ["layout.micro_batch=1"],
    "tp2 ep2": ["layout.tp=2", "layout.ep=2"],
    "recompute": ["layout.recompute=full"],
    "vpp2": ["layout.pp=2", "layout.vpp=2", "model.layers=4"],
}


def trained(config: Any) -> dict[str, Any]:
    """Losses, norms, figures and the digests of what was read, of every step; forwards without gradients."""
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer
    from llada_megatron.training.step import train_step

    groups.initialize(config.layout)
    schedule = rules.check(config)
    trainer = build_trainer(config, schedule)
    digests: dict[int, str] = {}
    trainer.on_batch = lambda indices, batch: digests.update(
        (index, batch.digest(row)) for row, index in enumerate(indices)
    )
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += not torch.is_grad_enabled()

    trainer.model[0].register_forward_pre_hook(count)
    steps = [train_step(trainer, step) for step in range(schedule.total_steps)]
    return {
        "loss": [step.loss for step in steps],
        "grad_norm": [step.grad_norm for step in steps],
        "figures": [step.figures for step in steps],
        "digests": digests,
        "forwards": forwards,
        "micro_batches": len(steps) * config.layout.global_batch // config.layout.micro_batch,
    }


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> str:
    return write(tmp_path_factory.mktemp("chats"), "chat")


def run_of(chats: str, name: str, *overrides: str) -> Any:
    return configure(chats, "sft", f"schedule.stages.0.objective={name}", *SETTINGS[name], *overrides)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_a_layout_changes_neither_drafts_nor_losses(chats, name):
    """One layout here, that splits tokens and layers; the others below."""
    check(chats, name, "pp2 cp2")


@pytest.mark.full
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "pp2 cp2"])
@pytest.mark.parametrize("name", SETTINGS)
def test_no_layout_changes_drafts_or_losses(chats, name, layout):
    check(chats, name, layout)


def check(chats: str, name: str, layout: str) -> None:
    same = [each for each in LAYOUTS[layout] if each.startswith("model.")]
    [one] = run_ranks(trained, run_of(chats, name, *same))
    config = run_of(chats, name, *LAYOUTS[layout])
    ranks = run_ranks(trained, config, processes=config.layout.processes)
    read = {(index, digest) for rank in ranks for index, digest in rank["digests"].items()}
    assert read == set(one["digests"].items())  # ranks of a context each build their batches whole
    assert ranks[0]["loss"] == pytest.approx(one["loss"], rel=2e-6)
    assert ranks[0]["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-5)
    if name == "oput":  # each turn is one forward of each micro-batch without gradients
        assert one["forwards"] == 2 * one["micro_batches"]
        assert all(0 <= step["draft_right"] <= 1 for step in one["figures"])
    else:
        assert one["forwards"] == 0 and one["figures"][0]["loss_replaced"] > 0


# Each mutation breaks one rank's arithmetic as a plausible bug would, or an exchange of ranks.


@contextmanager
def drafts_arrive(changed):
    """`passes.on_every_rank` with other arguments or collectives: changed(real, outputs, places, columns)."""
    from llada_megatron.objectives import passes

    real = passes.on_every_rank
    with mock.patch.object(passes, "on_every_rank", lambda *given: changed(real, *given)):
        yield


def not_summed_over(group):
    """The drafts of the other ranks of a group do not arrive."""
    from megatron.core import parallel_state
    from torch import distributed as dist

    summed = dist.all_reduce
    left_out = getattr(parallel_state, f"get_{group}_parallel_group")

    def without(real, *given):
        def all_reduce(tensor, **options):
            if options["group"] is not left_out():
                summed(tensor, **options)

        with mock.patch.object(dist, "all_reduce", all_reduce):
            return real(*given)

    return drafts_arrive(without)


def drafts_of_another_context_rank_do_not_arrive():
    """A rank learns from its own rows, which it drafted: the digests of whole batches alone can see it."""
    return not_summed_over("context")


def drafts_do_not_leave_the_last_pipeline_stage():
    return not_summed_over("pipeline_model")


def drafts_in_each_others_places():
    """Rank 1 puts what it drafted into its own places in the wrong order."""

    def turned(real, outputs, places, columns):
        if torch.distributed.get_rank():
            places = [(N, here.flip(0)) for N, here in places]
        return real(outputs, places, columns)

    return drafts_arrive(turned)


@contextmanager
def drafts_cut_at_the_end_of_a_block():
    """On rank 1 the last token of each block stays masked."""
    from llada_megatron.objectives import oput

    real = oput.with_draft

    def cut(tokens_BS, outputs_N, draft_N):
        before_the_end = outputs_N // len(tokens_BS) % BLOCK < BLOCK - torch.distributed.get_rank()
        return real(tokens_BS, outputs_N[before_the_end], draft_N[before_the_end])

    with mock.patch.object(oput, "with_draft", cut):
        yield


@contextmanager
def draft_batch_with_the_mask_of_another_sample():
    """Rank 1 drafts each sample under the mask of its complement, which is beside it."""
    from llada_megatron.objectives.diffusion import Diffusion

    real = Diffusion.batch  # of which Oput makes its draft batches alone

    def batch(objective, data, indices, stage, **options):
        pairs = objective.corruptions

        def exchanged(samples, indices, stage):
            masks = pairs(samples, indices, stage)
            return masks[::-1] if torch.distributed.get_rank() else masks

        with mock.patch.object(objective, "corruptions", exchanged):
            return real(objective, data, indices, stage, **options)

    with mock.patch.object(Diffusion, "batch", batch):
        yield


@contextmanager
def wrong_words(draws_of):
    from llada_megatron.objectives import editing

    real = editing.generator

    def generator(seed, purpose, index):
        return (draws_of if purpose is editing.Purpose.WRONG_WORD else real)(seed, purpose, index)

    with mock.patch.object(editing, "generator", generator):
        yield


def wrong_words_of_the_ambient_generator():
    """Of one that every rank seeds alike, and that each sample leaves elsewhere."""
    ambient = np.random.default_rng(0)
    return wrong_words(lambda *_: ambient)


def wrong_words_of_the_rank():
    from llada_megatron.parallel.random import generator

    def of_the_rank(seed, purpose, index):
        return generator(seed + torch.distributed.get_rank(), purpose, index)

    return wrong_words(of_the_rank)


MUTATIONS = {
    "oput": [
        (drafts_of_another_context_rank_do_not_arrive, "layout.cp=2"),
        (drafts_do_not_leave_the_last_pipeline_stage, "layout.pp=2"),
        (drafts_in_each_others_places, "layout.cp=2"),
        (drafts_cut_at_the_end_of_a_block, "layout.cp=2"),
        (draft_batch_with_the_mask_of_another_sample, "layout.processes=2"),
    ],
    "editing": [
        (wrong_words_of_the_ambient_generator, "layout.processes=2"),
        (wrong_words_of_the_rank, "layout.cp=2"),
    ],
}


@contextmanager
def no_mutation():
    yield


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_comparison_of_layouts_fails_for_every_deliberate_error(chats, name):
    [one] = run_ranks(trained, run_of(chats, name))
    layouts = dict.fromkeys(layout for _, layout in MUTATIONS[name])
    mutations = [*((no_mutation, layout) for layout in layouts), *MUTATIONS[name]]
    mutants = [(mutation, run_of(chats, name, layout)) for mutation, layout in mutations]
    in_digests_alone = drafts_of_another_context_rank_do_not_arrive
    for (mutation, _), found in zip(mutations, run_mutants(trained, mutants), strict=True):
        assert differs(found, one) == (mutation not in (no_mutation, in_digests_alone)), mutation.__name__
        if mutation in (no_mutation, in_digests_alone):
            reads_the_same = found["digests"].items() <= one["digests"].items()
            assert reads_the_same == (mutation is no_mutation), mutation.__name__
