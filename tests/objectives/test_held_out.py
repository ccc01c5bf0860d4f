"""Held-out preferences: every figure by hand, in every layout, and on record after a run."""

import math
from typing import Any

import numpy as np
import pytest

from llada_megatron.config import rules
from llada_megatron.config.schema import Config
from tests.distributed import run_ranks
from tests.objectives.conversations import BLOCK, configure, score, write

SEQUENCES = 3
OPTIONS = [
    "data.sequence_length=256",  # several pairs in a sequence
    "data.split='7,3'",
    f"evaluation.sequences={SEQUENCES}",
    f"evaluation.block_sizes=['{BLOCK}']",
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    prefix = write(tmp_path_factory.mktemp("pairs"), "preference")
    score(configure(prefix, "dpo"), prefix)
    return prefix


def held_out(config: Config) -> dict[str, Any]:
    """The figures of a model before it is trained."""
    from llada_megatron.evaluate.likelihood import Evaluator
    from llada_megatron.parallel import groups
    from llada_megatron.training.loop import build_trainer

    groups.initialize(config.layout)
    schedule = rules.check(config)
    trainer = build_trainer(config, schedule)
    samples = Evaluator(config, list(trainer.model)).samples
    return trainer.objectives["preference"].held_out(trainer.model, samples, schedule.stages[0])


def by_hand(config: Config) -> dict[str, Any]:
    """The margin of each held-out pair from logits, its masks drawn and summed here."""
    import torch

    from llada_megatron.attention.mask import block_starts
    from llada_megatron.evaluate.likelihood import Evaluator
    from llada_megatron.model.provider import build_model
    from llada_megatron.model.readout import LOGITS
    from llada_megatron.objectives.bound import complementary_count_mask
    from llada_megatron.objectives.diffusion import diffusion_inputs
    from llada_megatron.objectives.reference import ReferenceScores
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    grid, draws = config.diffusion.block_grid, config.preference.draws
    model = build_model(config)
    scores = ReferenceScores.load(config, BLOCK)
    found: dict[int, np.ndarray] = {}
    for sample in Evaluator(config, list(model)).samples:
        starts = block_starts(sample.cu_seqlens, BLOCK, grid)
        for text, document in enumerate(sample.document_ids):
            if document < 0:
                continue
            part = slice(sample.cu_seqlens[text], sample.cu_seqlens[text + 1])
            sums = []
            for draw in range(draws):
                masked, weights = np.zeros(len(starts), bool), np.zeros(len(starts))
                masked[part], weights[part] = complementary_count_mask(
                    config.run.seed, document, draw, draws, starts[part], sample.supervised[part]
                )
                inputs = diffusion_inputs(
                    [sample], [masked], block_size=BLOCK, grid=grid, mask_token_id=config.model.mask_token_id
                )
                inputs.readout = LOGITS
                with torch.no_grad():
                    log_p = model[0](inputs).double().log_softmax(dim=-1).numpy()
                clean = sample.tokens[masked]
                sums.append(weights[masked] @ log_p[np.arange(len(clean)), clean])
            found[document] = np.array(sums)
    rewards = {
        document: bound - scores.of(config.data.path[0], document) for document, bound in found.items()
    }
    chosen = [document for document in found if document % 2 == 0]
    margins = [config.preference.beta * (rewards[one] - rewards[one + 1]) for one in chosen]
    return {
        "margin": [float(margin.mean()) for margin in margins],
        "accuracy": [float(margin.mean() > 0) for margin in margins],
        "margin_variance": [float(margin.var(ddof=1)) for margin in margins],
        "chosen_bound": [float(-found[one].mean()) for one in chosen],
        "rejected_bound": [float(-found[one + 1].mean()) for one in chosen],
    }


def test_every_figure_equals_that_of_sums_over_logits_by_hand(pairs):
    config = configure(pairs, "dpo", *OPTIONS)
    [made], [expected] = run_ranks(held_out, config), run_ranks(by_hand, config)
    assert made.keys() == expected.keys() and len(expected["margin"]) > SEQUENCES
    for name, values in expected.items():
        error = np.std(values, ddof=1) / math.sqrt(len(values))
        assert made[name]["mean"] == pytest.approx(np.mean(values), rel=1e-5)
        assert made[name]["se"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["layout.cp=2"], marks=pytest.mark.slow),
        pytest.param(["layout.pp=2", "layout.vpp=2"], marks=pytest.mark.slow),
        pytest.param(["layout.processes=2"], marks=pytest.mark.slow),
        ["layout.micro_batch=6", "layout.global_batch=12"],
    ],
    ids=" ".join,
)
def test_figures_do_not_depend_on_micro_batch_or_layout(pairs, layout):
    [expected] = run_ranks(held_out, configure(pairs, "dpo", *OPTIONS))
    config = configure(pairs, "dpo", *OPTIONS, *layout)
    for found in run_ranks(held_out, config, processes=config.layout.processes):
        for name, figure in expected.items():
            assert found[name] == pytest.approx(figure, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_every_text_of_every_split_is_scored(pairs):
    """A run that splits the corpus otherwise has its held-out pairs scored too."""
    scored = {}
    for split in ("7,3", "3,7"):
        config = configure(pairs, "dpo", *OPTIONS, f"data.split='{split}'", "evaluation.sequences=1000")
        [scored[split]] = run_ranks(held_out, config)
    assert all(math.isfinite(figure["mean"]) for found in scored.values() for figure in found.values())
    assert scored["7,3"]["margin"] != scored["3,7"]["margin"]


@pytest.mark.slow
def test_a_policy_that_is_its_reference_has_no_margin(tmp_path):
    prefix = write(tmp_path, "preference")
    config = configure(prefix, "dpo", *OPTIONS)
    score(config, prefix, seed=config.run.seed)
    [found] = run_ranks(held_out, config)
    assert found["margin"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found["margin_variance"]["mean"] == pytest.approx(0, abs=1e-6)
