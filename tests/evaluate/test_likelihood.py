"""Held-out likelihoods of a freshly initialised model against logits summed by hand."""

import math
import os
from itertools import pairwise

import numpy as np
import pytest

from tests.distributed import run_ranks
from tests.training.runs import TWO, configure, copy_corpus

SEQUENCES = 5  # odd: the last micro-batch of two is padded


def config_of(prefixes: str, tmp_path, *overrides: str):
    evaluation = ["evaluation.block_sizes=['1', '4', full]", f"evaluation.sequences={SEQUENCES}"]
    return configure(prefixes, tmp_path, *evaluation, "evaluation.draws=3", *overrides)


def with_evaluator(config, function):
    from llada_megatron.evaluate.likelihood import Evaluator
    from llada_megatron.model.provider import build_model
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    model = build_model(config)
    return function(config, Evaluator(config, model))


def every_estimate(config, evaluator):
    return {
        "bounds": evaluator.bounds(),
        "ar": evaluator.autoregressive(),
        "views": evaluator.block_one_views(),
        "baselines": evaluator.baselines,
        "sequences": len(evaluator.samples),
    }


def log_probabilities(evaluator, tokens, positions, mask):
    """Log probabilities [S, V] at every position of one input."""
    import torch

    from llada_megatron.attention.context import ContextShard
    from llada_megatron.model.inputs import ModelInputs
    from llada_megatron.model.readout import LOGITS

    rows = torch.arange(len(tokens))
    at = torch.from_numpy(tokens)[None], torch.from_numpy(positions)[None], ContextShard(mask), rows
    inputs = ModelInputs(*at, readout=LOGITS)
    with torch.no_grad():
        return evaluator.model[0](inputs).double().log_softmax(dim=-1).numpy()


def sums_by_hand(config, evaluator):
    """Per sequence: AR, bound of block 4 and of the full block, block 1 read three ways; predicted tokens."""
    import torch

    from llada_megatron.attention import BlockDiffusionMask
    from llada_megatron.attention.mask import block_starts
    from llada_megatron.config.schema import BlockGrid
    from llada_megatron.objectives.bound import exact_count_mask

    length, mask_id, draws = config.data.sequence_length, config.model.mask_token_id, config.evaluation.draws
    once, twice = np.arange(length), np.tile(np.arange(length), 2)
    found = []
    for index, sample in enumerate(evaluator.samples):
        cu, clean = torch.from_numpy(sample.cu_seqlens), sample.tokens
        following = [(i, i + 1) for a, b in pairwise(sample.cu_seqlens) for i in range(a, b - 1)]
        here, ahead = (np.array(side) for side in zip(*following, strict=True))
        causal = BlockDiffusionMask([cu], 1, clean_copy=False, causal=True)
        row = {"ar": -log_probabilities(evaluator, clean, once, causal)[here, clean[ahead]].sum()}
        for size in (4, length):
            row[size] = 0.0
            for draw in range(draws):
                starts = block_starts(sample.cu_seqlens, size, BlockGrid.sequence)
                masked, weights = exact_count_mask(config.run.seed, index, draw, draws, starts)
                noisy = np.where(masked, mask_id, clean)
                double = size < length
                mask = BlockDiffusionMask([cu], size, clean_copy=double)
                tokens = np.concatenate([noisy, clean]) if double else noisy
                log_p = log_probabilities(evaluator, tokens, twice if double else once, mask)
                row[size] -= (weights * log_p[once, clean])[masked].sum() / draws
        tokens = np.concatenate([np.full(length, mask_id), clean])
        log_p = log_probabilities(evaluator, tokens, twice, BlockDiffusionMask([cu], 1))
        row["unshifted"] = -log_p[once, clean].sum()
        row["shifted"] = -log_p[here, clean[ahead]].sum()
        row["ar_from_clean_half"] = -log_p[length + here, clean[ahead]].sum()
        found.append({**row, "predicted": len(following)})
    return every_estimate(config, evaluator), found


def test_every_figure_equals_a_sum_over_logits_by_hand(corpus, tmp_path):
    config = config_of(corpus, tmp_path, "layout.micro_batch=2")
    [(made, rows)] = run_ranks(with_evaluator, config, sums_by_hand)
    total = {key: sum(row[key] for row in rows) for key in rows[0]}
    tokens = SEQUENCES * config.data.sequence_length
    assert made["ar"]["mean"] == pytest.approx(total["ar"] / total["predicted"], rel=1e-6)
    for size in (4, config.data.sequence_length):
        assert made["bounds"][str(size)]["mean"] == pytest.approx(total[size] / tokens, rel=1e-6)
        per_sequence = np.array([row[size] for row in rows]) / config.data.sequence_length
        error = per_sequence.std(ddof=1) / math.sqrt(SEQUENCES)
        assert made["bounds"][str(size)]["se"] == pytest.approx(error, rel=1e-4)
    assert made["bounds"]["1"]["mean"] == pytest.approx(total["unshifted"] / tokens, rel=1e-6)
    assert made["views"]["unshifted"] == made["bounds"]["1"]["mean"]
    for view in ("shifted", "ar_from_clean_half"):
        assert made["views"][view] == pytest.approx(total[view] / total["predicted"], rel=1e-6)
    # An autoregressive model read from the clean half of block 1 is the autoregressive model.
    assert made["views"]["ar_from_clean_half"] == pytest.approx(made["ar"]["mean"], rel=1e-6)


LAYOUTS = [  # `llada verify layouts` compares the bound under the others
    ["layout.micro_batch=4"],
    [TWO],
    pytest.param([TWO, "layout.tp=2", "layout.ep=2"], marks=pytest.mark.slow),
    pytest.param([TWO, "layout.pp=2", "layout.vpp=2"], marks=pytest.mark.slow),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_figures_do_not_depend_on_micro_batch_or_layout(corpus, tmp_path, layout):
    (plain,) = run_ranks(with_evaluator, config_of(corpus, tmp_path), every_estimate)
    config = config_of(corpus, tmp_path, *layout)
    for split in run_ranks(with_evaluator, config, every_estimate, processes=config.layout.processes):
        for size, bound in plain["bounds"].items():
            assert split["bounds"][size] == pytest.approx(bound, rel=1e-5)
        assert split["ar"] == pytest.approx(plain["ar"], rel=1e-5)
        assert split["views"] == pytest.approx(plain["views"], rel=1e-6)


def test_a_blend_of_corpora_is_evaluated(corpus, tmp_path):
    other = copy_corpus(corpus, tmp_path)
    (made,) = run_ranks(with_evaluator, config_of(f"{corpus},{other}", tmp_path), every_estimate)
    assert made["sequences"] == SEQUENCES and made["ar"]["mean"] > 0


def test_bits_per_byte_use_the_bytes_of_the_corpus(corpus, tmp_path):
    from llada_megatron.evaluate.baselines import bytes_per_token

    assert bytes_per_token([corpus]) == pytest.approx(1, abs=0.05)  # bytes, and an end to each document
    assert bytes_per_token([corpus]) < 1
    elsewhere = copy_corpus(corpus, tmp_path)
    os.remove(f"{elsewhere}.json")
    assert bytes_per_token([corpus, elsewhere]) is None
    (made,) = run_ranks(with_evaluator, config_of(corpus, tmp_path), every_estimate)
    bits = made["ar"]["mean"] / math.log(2) / bytes_per_token([corpus])
    assert made["ar"]["bits_per_byte"] == pytest.approx(bits, rel=1e-12)


def test_entropies_of_a_text_by_hand():
    from llada_megatron.data.packed import PackedSample
    from llada_megatron.evaluate.baselines import entropies

    # Two documents, 0 1 0 1 and 0 0: inside them the pairs 01, 10, 01 and 00.
    made = entropies([PackedSample(np.array([0, 1, 0, 1, 0, 0]), np.array([0, 4, 6]))])
    thirds = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert made["unigram"] == pytest.approx(thirds)
    assert made["bigram"] == pytest.approx(3 / 4 * thirds)
