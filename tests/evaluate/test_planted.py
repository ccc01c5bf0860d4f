"""Wrong tokens planted in held-out text: what is read, and what counts as mended and spoiled."""

import numpy as np
import pytest
import torch

from llada_megatron.config.compose import compose
from llada_megatron.data.packed import PackedSample
from llada_megatron.evaluate.planted import NAMES, Planted, shares_of
from tests.distributed import run_ranks
from tests.evaluate.test_likelihood import config_of, with_evaluator

L, MASK = 64, 257
SAMPLES = [
    PackedSample(
        np.random.default_rng(index).integers(0, 256, L),
        np.array([0, 20, L], dtype=np.int32),
        supervised=np.arange(L) % 4 > 0,
    )
    for index in range(6)
]


def made(share: float = 0.2) -> tuple:
    config = compose(
        ["experiment=parity", f"model.mask_token_id={MASK}", f"evaluation.planted_share={share}"]
    )
    planted = Planted(config, 8)
    return planted, planted.batch(SAMPLES, list(range(6)))


def shares(planted: Planted, batch, choice_N: torch.Tensor, probability: float) -> list[float]:
    """Means by NAMES, of a model that would put these tokens with this probability."""
    output = torch.stack([choice_N.double(), torch.full((len(choice_N),), probability).double()], dim=-1)
    found = shares_of(planted.tallies(batch, output).numpy())
    assert tuple(found) == NAMES and all(each["se"] >= 0 for each in found.values())
    return [each["mean"] for each in found.values()]


def test_what_may_be_masked_is_planted_and_read_out_and_nothing_is_masked():
    _, batch = made()
    text = batch.inputs.tokens[:, :L].numpy()
    clean = np.stack([sample.tokens for sample in SAMPLES])
    assert (batch.inputs.tokens[:, L:].numpy() == clean).all() and not (text == MASK).any()
    maskable = np.stack([sample.supervised for sample in SAMPLES])
    assert (text == clean)[~maskable].all() and 0.1 < (text != clean)[maskable].mean() < 0.3
    assert len(batch.inputs.outputs) == maskable.sum()
    assert (
        batch.rows["true"].numpy() == np.concatenate([c[m] for c, m in zip(clean, maskable, strict=True)])
    ).all()
    assert (
        batch.rows["read"].numpy() == np.concatenate([t[m] for t, m in zip(text, maskable, strict=True)])
    ).all()


def test_a_model_that_knows_mends_all_one_that_repeats_nothing_and_one_that_guesses_spoils():
    planted, batch = made()
    read, true = batch.rows["read"], batch.rows["true"]
    before = float((read != true).double().mean())
    assert shares(planted, batch, true, 0.9) == pytest.approx([before, 0, 1, 0])
    assert shares(planted, batch, read, 0.9) == pytest.approx([before, before, 0, 0])
    assert shares(planted, batch, true, 0.4) == pytest.approx([before, before, 0, 0])  # not sure enough
    assert shares(planted, batch, torch.full_like(true, 300), 0.9) == pytest.approx([before, 1, 0, 1])


def test_without_a_wrong_token_the_share_that_was_mended_is_unknown():
    planted, batch = made(share=0.0)
    assert shares_of(planted.tallies(batch, torch.zeros(len(batch.inputs.outputs), 2)).numpy())[NAMES[2]] == {
        "mean": None,
        "se": None,
    }


def of_block_8(config, evaluator):
    return evaluator.planted(8)


@pytest.mark.slow
def test_a_layout_gives_the_same_shares(corpus, tmp_path):
    ranks = {}
    for name, own in {"one": [], "cp2": ["layout.cp=2"], "pp2": ["layout.pp=2"]}.items():
        config = config_of(corpus, tmp_path, "evaluation.planted_share=0.3", *own)
        ranks[name] = run_ranks(with_evaluator, config, of_block_8, processes=config.layout.processes)
    for found in (rank for each in ranks.values() for rank in each):
        for name, share in ranks["one"][0].items():
            assert found[name] == pytest.approx(share, rel=1e-9)
