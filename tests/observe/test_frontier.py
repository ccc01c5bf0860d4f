"""AUP against values worked out by hand."""

import math

import pytest

from llada_megatron.observe.frontier import Point, aup, counted, unweighted_aup


def points(*pairs: tuple[float, float]) -> list[Point]:
    return [
        Point(speed, accuracy, None, f"threshold={index}") for index, (speed, accuracy) in enumerate(pairs)
    ]


def test_one_decoding_has_the_rectangle_in_front_of_it() -> None:
    assert aup(points((2.0, 70.0)), best=90.0) == 140.0
    assert unweighted_aup(points((2.0, 70.0))) == 0.0
    assert aup([], best=0.0) == 0.0


def test_at_the_best_accuracy_weights_are_one() -> None:
    # 1 * 80 + (3 - 1) / 2 * (80 + 80)
    assert aup(points((1.0, 80.0), (3.0, 80.0)), best=80.0) == pytest.approx(240.0)
    assert unweighted_aup(points((1.0, 80.0), (3.0, 80.0))) == pytest.approx(160.0)


def test_accuracy_below_the_best_is_weighted_down_but_not_in_the_first_rectangle() -> None:
    # W(76) = exp(-3 * 0.05), W(80) = 1: 80 + 1/2 * (80 + 76 * 0.860708) + 2/2 * (76 + 76) * 0.860708
    expected = 80 + 0.5 * (80 + 76 * math.exp(-0.15)) + 152 * math.exp(-0.15)
    assert aup(points((1.0, 80.0), (2.0, 76.0), (4.0, 76.0)), best=80.0) == pytest.approx(expected)
    assert expected == pytest.approx(283.5345, abs=1e-4)
    # Another model's 100 weighs all three down, and not the rectangle.
    w80, w76 = math.exp(-0.6), math.exp(-0.72)
    expected = 80 + 0.5 * (80 * w80 + 76 * w76) + 152 * w76
    assert aup(points((1.0, 80.0), (2.0, 76.0), (4.0, 76.0)), best=100.0) == pytest.approx(expected)


def test_what_loses_more_than_five_points_against_the_slowest_is_left_out_and_bridged() -> None:
    those = points((4.0, 75.0), (1.0, 80.0), (3.0, 74.9))
    assert [point.tokens_per_forward for point in counted(those)] == [1.0, 4.0]
    assert aup(those, best=80.0) == pytest.approx(aup(points((1.0, 80.0), (4.0, 75.0)), best=80.0))
    # The other form keeps it: (3 - 1) / 2 * (80 + 74.9) + (4 - 3) / 2 * (74.9 + 75)
    assert unweighted_aup(those) == pytest.approx(154.9 + 74.95)


def test_the_order_of_the_points_does_not_matter() -> None:
    those = points((1.0, 80.0), (2.0, 79.0), (5.0, 76.0))
    assert aup(those[::-1], best=80.0) == aup(those, best=80.0)


def test_a_model_that_is_never_right_has_an_area_of_nothing() -> None:
    assert aup(points((1.0, 0.0), (4.0, 0.0)), best=0.0) == 0.0
