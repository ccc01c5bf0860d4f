"""One set of draws over all mask rates says the variance of every clip."""

import numpy as np
import pytest

from llada_megatron import cli
from llada_megatron.bench.clips import block_losses
from llada_megatron.config.errors import BadInput
from llada_megatron.objectives import clips
from tests.distributed import run_ranks
from tests.training.runs import configure


def test_the_grid_is_no_clip_and_then_every_width():
    grid = clips.grid()
    assert grid[0] == (0.001, 1.0) and len(grid) == len(set(grid)) == 1 + sum(range(3, 12))
    assert (0.45, 0.95) in grid and (0.3, 0.8) in grid and (0.001, 0.5) in grid
    assert all(0 < low < high <= 1 for low, high in grid)


def test_draws_within_a_clip_are_draws_of_that_clip():
    """A block whose loss is 2 t + 1: mean low + high + 1, variance (high - low)^2 / 3. Three blocks make a
    sequence of 6 tokens; of the last one every draw is the same."""
    rates = np.random.default_rng(0).uniform(clips.LEAST_RATE, 1, (60_000, 3))
    losses = np.stack([2 * rates[:, 0] + 1, 2 * rates[:, 1] + 1, np.full(60_000, 3.0)], axis=1)
    for clip in clips.clips_of(rates, losses, [6]):
        assert clip.variance == pytest.approx(2 * (clip.high - clip.low) ** 2 / 3 / 36, rel=0.03)
        assert clip.mean == pytest.approx((2 * (clip.low + clip.high + 1) + 3) / 6, rel=0.01)


def test_too_few_draws_are_refused():
    with pytest.raises(BadInput, match=r"2 draws leave none within .* give more --draws"):
        clips.clips_of(np.full((2, 4), 0.05), np.ones((2, 4)), [4])


def measured(config):
    """Rates and losses of blocks of 8, the bound, and L, of first weights."""
    from llada_megatron.evaluate.likelihood import Evaluator
    from llada_megatron.model.provider import build_model
    from llada_megatron.parallel import groups

    groups.initialize(config.layout)
    evaluator = Evaluator(config, build_model(config))
    length = config.data.sequence_length
    rates, losses = block_losses(evaluator, 8, 40)
    assert rates.shape == losses.shape and rates.shape[1] > len(evaluator.samples) * length // 8  # cut blocks
    return rates, losses, evaluator.bound(8)["mean"], length


def test_losses_of_blocks_have_the_bound_as_their_mean(corpus, tmp_path):
    """Nothing is learnt yet: a masked token costs about the same whatever the mask, 1/t is what varies."""
    config = configure(corpus, tmp_path, "evaluation.sequences=4", "evaluation.draws=8")
    ((rates, losses, bound, length),) = run_ranks(measured, config)
    per_token = losses.sum(axis=1) / (4 * length)
    error = per_token.std(ddof=1) / 40**0.5
    assert abs(per_token.mean() - bound) < 4 * error
    assert clips.clips_of(rates, losses, [length] * 4)[0].mean == pytest.approx(per_token.mean())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--draws", "1"], "--draws 1: give at least 2."),
        (["--sequences", "0"], "--sequences 0: give at least 2."),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(capsys, tmp_path, arguments, said):
    assert cli.main(["bench", "clips", str(tmp_path), *arguments]) == 2
    assert said in capsys.readouterr().err
