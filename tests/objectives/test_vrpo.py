"""What VRPO says of a preference's variance holds for counts of masked tokens in blocks, on a small model."""

import pytest

from tests.objectives.vrpo import ROWS, Variances, table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[str, Variances]:
    return table(tmp_path_factory.mktemp("vrpo"), counts=48, takes_gradients=False)


def test_masks_that_policy_and_reference_share_take_the_variance_of_the_score_away(rows):
    shared, apart = rows["n_t 4, n_y 1"], rows["n_t 4, n_y 1, masks not shared"]
    assert apart.score > 100 * shared.score and apart.loss > 100 * shared.loss


def test_of_one_budget_as_many_counts_as_masks_are_best(rows):
    scores = [rows[f"n_t {n_t}, n_y {4 // n_t}"].score for n_t in (4, 2, 1)]
    assert scores == sorted(scores)


@pytest.mark.parametrize("figure", ["score", "loss"])
def test_six_ways_to_estimate_are_ordered_as_in_the_paper(rows, figure):
    found = [getattr(rows[name], figure) for name in ROWS]
    assert found == sorted(found)
