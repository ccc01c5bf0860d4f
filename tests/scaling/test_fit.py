"""A law of known parameters is found again; what points do not determine is refused, or said."""

import numpy as np
import pytest

from llada_megatron.config.errors import BadInput
from llada_megatron.scaling import budget
from llada_megatron.scaling.fit import Fit, check, fit
from llada_megatron.scaling.laws import CHINCHILLA, DLCM, Centred
from llada_megatron.scaling.points import Point
from llada_megatron.scaling.report import doubts
from tests.scaling.ladder import KNOWN, KNOWN_DLCM, chinchilla, dlcm, grid, scattered

LADDER = grid(N=np.geomspace(1e7, 1e9, 4), D=np.geomspace(2e8, 2e10, 4))
LOSSES = chinchilla(**LADDER)


@pytest.mark.parametrize(("law", "formula"), [(CHINCHILLA, chinchilla), (DLCM, dlcm)])
def test_a_vector_is_its_parameters_and_slopes_are_those_of_the_loss(law, formula):
    columns = grid(
        N=np.array([1e8, 3e9]), D=np.array([2e9, 7e10]), R=np.array([2, 4]), P=np.array([0.3, 0.6])
    )
    centred = Centred.at(law, columns)
    vector = np.linspace(0.2, 0.9, len(law.parameters))
    log_loss, slopes = centred.log_loss(columns, vector)
    plain = formula(**{name: columns[name] for name in law.variables}, of=centred.values(vector))
    np.testing.assert_allclose(np.exp(log_loss), plain, rtol=1e-12)
    for number, slope in enumerate(slopes):
        move = 1e-6 * np.eye(len(vector))[number]
        rise = centred.log_loss(columns, vector + move)[0] - centred.log_loss(columns, vector - move)[0]
        np.testing.assert_allclose(slope, rise / 2e-6, rtol=1e-5, atol=1e-8)


def test_parameters_of_exact_points_are_found_though_one_run_failed():
    losses = LOSSES.copy()
    losses[5] *= 1.3
    found = fit(CHINCHILLA, LADDER, losses, draws=20).values()
    for name in ("E", "alpha", "beta"):
        assert found[name] == pytest.approx(KNOWN[name], rel=0.01)


def test_intervals_hold_the_parameters_and_the_loss_of_a_larger_run():
    found = fit(CHINCHILLA, LADDER, scattered(LOSSES, by=0.004, seed=1), draws=100)
    for name, (low, high) in found.intervals().items():
        assert low < KNOWN[name] < high, name
    larger = {"N": np.array([4e9]), "D": np.array([8e10])}
    ((low, high),) = found.run_intervals(larger)
    assert low < chinchilla(**larger)[0] < high and high - low < 0.05 * low
    assert not doubts(found) and 0.002 < found.rms < 0.008


def test_parameters_of_dlcm_are_found():
    columns = grid(
        N=np.geomspace(1e8, 2e9, 4), D=np.geomspace(2e9, 2e11, 4), R=np.array([2, 8]), P=np.array([0.3, 0.7])
    )
    found = fit(DLCM, columns, scattered(dlcm(**columns), by=5e-4), draws=40)
    intervals = found.intervals()
    for name in ("E", "d_tok", "d_con", "g", "d_data"):
        low, high = intervals[name]
        assert low < KNOWN_DLCM[name] < high, name
    between = {"N": np.array([8e8]), "D": np.array([3e10]), "R": np.array([4]), "P": np.array([0.6])}
    assert found.loss(between) == pytest.approx(dlcm(**between), rel=2e-3)


@pytest.mark.parametrize(
    ("columns", "draws", "said"),
    [
        (grid(N=np.array([1e7]), D=np.geomspace(1e8, 1e10, 5)), 100, "5 points cannot fit the 5 parameters"),
        (grid(N=np.array([1e7, 1e8]), D=np.geomspace(1e8, 1e10, 5)), 100, "have 2 values of N"),
        (LADDER, 5, "--bootstrap 5"),
    ],
)
def test_points_that_determine_no_law_are_refused(columns, draws, said):
    with pytest.raises(BadInput, match=said):
        fit(CHINCHILLA, columns, chinchilla(**columns), draws=draws)


def test_an_exponent_that_the_points_do_not_determine_is_named():
    found = fit(CHINCHILLA, LADDER, scattered(1.7 + 400 / LADDER["N"] ** 0.34, by=0.004), draws=40)
    assert doubts(found).keys() == {"beta"}


def test_a_loss_without_a_floor_leaves_none_to_be_found():
    losses = 400 / LADDER["N"] ** 0.34 + 410 / LADDER["D"] ** 0.28
    assert "it ended at" in doubts(fit(CHINCHILLA, LADDER, losses, draws=20))["E"]


def test_values_that_are_nearly_one_count_as_one():
    columns = grid(N=np.array([1e7, 1e8]), D=np.geomspace(1e8, 1e10, 4))
    columns["N"][::2] *= 1.04
    with pytest.raises(BadInput, match="have 2 values of N"):
        check(CHINCHILLA, columns, 100)


def test_a_budget_buys_what_no_other_size_betters():
    points = [
        Point("", {"N": size, "D": tokens}, loss, flops_per_token=20 * size**0.9)
        for size, tokens, loss in zip(LADDER["N"], LADDER["D"], LOSSES, strict=True)
    ]
    cost = budget.TokenFlops.of(points)
    assert (cost.k, cost.m) == pytest.approx((20, 0.9))
    (best,) = budget.optima(fit(CHINCHILLA, LADDER, LOSSES, draws=20), points, [1e21], cost, {})
    sizes = np.geomspace(1e7, 1e11, 4001)
    losses = chinchilla(sizes, 1e21 / (20 * sizes**0.9))
    assert best.size == pytest.approx(sizes[losses.argmin()], rel=0.02)
    assert best.loss == pytest.approx(losses.min(), rel=1e-4)
    assert best.tokens * cost(best.size) == pytest.approx(1e21)


def test_a_budget_buys_of_dlcm_what_no_other_size_betters():
    columns = grid(N=np.geomspace(1e8, 2e9, 3), D=np.geomspace(2e9, 2e11, 4), R=[2, 8], P=[0.3, 0.7])
    centred = Centred.at(DLCM, columns)
    known = np.array([KNOWN_DLCM[name] for name in DLCM.parameters])
    for k, term in enumerate(DLCM.terms):  # as a vector counts them
        if term.offset:
            known[DLCM.parameters.index(term.offset)] = np.log(KNOWN_DLCM[term.offset] / centred.sizes[k])
        size = centred.sizes[k] ** (KNOWN_DLCM[term.exponent] if term.exponent else 0)
        factor = centred.factors[k] ** (KNOWN_DLCM[term.factor_exponent] if term.factor else 0)
        known[k] = np.log(known[k] / size * factor)
    found = Fit(centred, known, np.zeros((len(known), 2)), np.zeros(48), known[None], np.zeros(1))
    points = [
        Point("", {name: float(values[n]) for name, values in columns.items()}, 3.0)
        for n in range(len(columns["N"]))
    ]
    shape = {"R": 4.0, "P": 0.6}
    cost = budget.TokenFlops.of(points).at(shape)
    (best,) = budget.optima(found, points, [1e21], cost, shape)
    sizes = np.geomspace(1e7, 1e11, 4001)
    losses = dlcm(sizes, 1e21 / (6 * sizes * (0.4 + 0.6 / 4)), **shape)
    assert best.size == pytest.approx(sizes[losses.argmin()], rel=0.02)
    assert best.loss == pytest.approx(losses.min(), rel=1e-6)
    assert best.tokens * 6 * 0.55 * best.size == pytest.approx(1e21)
