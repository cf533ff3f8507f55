import math

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon.auditing.gap_closed import Gap, Judgement, gap_closed
from sophon.auditing.scores import Score, Spread, align, harm, score, sgrc, signed_rfd, spread, steps_to
from tests.auditing.records import ACCURACY, MSE

CANNOT = Judgement.UNKNOWN
UNCLEAR = "unprotected is not clearly better than scratch"
ERROR = "unprotected and scratch differ by less than the error of 1000 test images and 1 seed"


def rows(*tests, error=0.0, attack="a"):
    frame = pd.DataFrame(
        {"attack": attack, "test": tests, "standard_error": error, "test_images": 400, "select": tests}
    )
    return frame.assign(diverged=frame["test"].isna())


def of(mean, half=0.0):
    return Score(mean, half, seeds=1, test_images=1000)


def three(p, u, s):
    return {"protected": p, "unprotected": u, "scratch": s}


def curve(*pairs):
    return pd.Series([value for _, value in pairs], [step for step, _ in pairs], dtype=float)


# ---- scores of a role -----------------------------------------------------------------------------------------------


def test_a_score_adds_images_and_seeds_in_quadrature():
    usual = spread(rows(1.0, 2.0, 3.0))
    assert usual == Spread(1.0, 2)
    found = score(rows(1.0, 2.0, 3.0, error=2.0), ACCURACY, usual)
    assert found.mean == 2.0
    # Student's t at 2 degrees of freedom is 4.3027
    assert found.half == pytest.approx(math.hypot(1.959964 * 2, 4.302653 / math.sqrt(3)))
    assert (found.low, found.high) == (0.0, pytest.approx(2 + found.half))
    assert (found.seeds, found.diverged, found.test_images, found.values) == (3, 0, 400, (1.0, 2.0, 3.0))


def test_the_spread_over_seeds_is_pooled_over_attacks_and_no_smaller_than_an_attacks_own():
    calm, wild = rows(5.0, 5.0, 5.0), rows(0.0, 30.0, attack="b")
    pooled = spread(pd.concat([calm, wild]))
    assert pooled == Spread(pytest.approx(math.sqrt(450 / 3)), 3)
    t = 3.182446  # at 3 degrees of freedom
    assert score(calm, ACCURACY, pooled).half == pytest.approx(t * pooled.deviation / math.sqrt(3))
    assert score(wild, ACCURACY, pooled).half == pytest.approx(t * math.sqrt(450) / math.sqrt(2))
    assert spread(rows(5.0)) == Spread(0.0, 0)


@pytest.mark.parametrize(
    ("metric", "mean", "ends"), [(ACCURACY, 99.0, (89.2, 100.0)), (ACCURACY, 1.0, (0.0, 10.8)), (MSE, 5.0, (0.0, 14.8))]
)
def test_intervals_stay_within_what_the_metric_can_be(metric, mean, ends):
    found = score(rows(mean, error=5.0), metric)
    assert (found.low, found.high) == pytest.approx(ends, abs=0.01)


def test_what_diverged_is_counted_and_left_out():
    found = score(rows(20.0, math.nan), ACCURACY)
    assert (found.mean, found.seeds, found.diverged) == (20.0, 1, 1)
    nothing = score(rows(math.nan), ACCURACY)
    assert math.isnan(nothing.mean)
    assert (nothing.seeds, nothing.diverged) == (0, 1)


# ---- gap closed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("roles", "metric", "value", "ends", "reason"),
    [
        (three(of(70), of(80), of(60)), ACCURACY, 0.5, (0.5, 0.5), ""),
        (three(of(50), of(80), of(60)), ACCURACY, 1.5, (1.5, 1.5), ""),
        (three(of(0.5), of(0.25), of(0.75)), MSE, 0.5, (0.5, 0.5), ""),
        # only the protected model is uncertain: the interval is that of 80 - p over 20
        (three(of(70, 4), of(80), of(60)), ACCURACY, 0.5, (0.3, 0.7), ""),
        (three(of(1), of(60.9), of(60)), ACCURACY, math.nan, (math.nan,) * 2, UNCLEAR),
        (three(of(1), of(55), of(60)), ACCURACY, math.nan, (math.nan,) * 2, UNCLEAR),
        (three(of(1), of(0.5), of(0.504)), MSE, math.nan, (math.nan,) * 2, UNCLEAR),
        (three(of(1), of(0.0), of(0.0)), MSE, math.nan, (math.nan,) * 2, UNCLEAR),
        (three(of(70), of(80, 15), of(60, 15)), ACCURACY, 0.5, (math.nan,) * 2, ERROR),
        ({"protected": of(1)}, ACCURACY, math.nan, (math.nan,) * 2, "no result of unprotected and scratch"),
        (three(of(-1e308), of(1e308), of(9e307)), MSE, math.nan, (math.nan,) * 2, UNCLEAR),
        (
            three(of(1e308), of(-1e308), of(-9e307)),
            MSE,
            math.nan,
            (math.nan,) * 2,
            "the results are too large to compare",
        ),
        (three(of(1), Score(diverged=1), of(1)), ACCURACY, math.nan, (math.nan,) * 2, "no result of unprotected"),
    ],
)
def test_gap_closed_by_hand(roles, metric, value, ends, reason):
    found = gap_closed(roles, metric)
    assert (found.value, found.low, found.high) == pytest.approx((value, *ends), nan_ok=True)
    assert found.reason == reason


def test_removal_is_gap_closed_by_another_yardstick():
    roles = three(of(70), of(80), of(10)) | {"filtered": of(60)}
    assert gap_closed(roles, ACCURACY, "filtered").value == 0.5
    assert gap_closed(three(of(70), of(80), of(10)), ACCURACY, "filtered").reason == "no result of filtered"
    unclear = gap_closed(roles | {"filtered": of(79.5)}, ACCURACY, "filtered")
    assert math.isnan(unclear.value)
    assert unclear.reason == "unprotected is not clearly better than filtered"


@given(
    st.tuples(*[st.floats(0, 100)] * 3),
    st.tuples(*[st.floats(0.01, 20)] * 3),
)
def test_the_interval_ends_where_the_difference_is_just_its_error(means, halves):
    """Fieller's ends are the ratios r at which (u - p) - r (u - s) is as large as its own 95 % half width."""
    p, u, s = (of(*each) for each in zip(means, halves, strict=True))
    gap = gap_closed(three(p, u, s), ACCURACY)
    if math.isnan(gap.low):
        return
    assert gap.low - 1e-9 <= gap.value <= gap.high + 1e-9
    for ratio in (gap.low, gap.high):
        left = (u.mean - p.mean) - ratio * (u.mean - s.mean)
        error = math.hypot((1 - ratio) * u.half, p.half, ratio * s.half)
        assert abs(left) == pytest.approx(error, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("gap", "state"),
    [
        (Gap(1.0, 1.0, 1.0), Judgement.HOLDS),
        (Gap(0.95, 0.55, 3.0), Judgement.HOLDS),
        (Gap(0.95, 0.45, 1.1), CANNOT),
        (Gap(0.4, 0.01, 0.7), Judgement.WEAKENED),
        (Gap(0.4, -0.01, 0.7), CANNOT),
        (Gap(0.05, -0.5, 0.6), Judgement.BROKEN),
        (Gap(0.05, -0.5, 0.95), CANNOT),
        (Gap(-3.0, -9.0, -1.0), Judgement.BROKEN),
        (Gap(0.4, reason="no interval"), CANNOT),
        (Gap(reason="no value"), CANNOT),
    ],
)
def test_words_for_a_gap(gap, state):
    assert gap.state == state


# ---- other formulas -------------------------------------------------------------------------------------------------


def test_harm_by_hand_in_both_directions():
    found = harm(of(70, 3), of(80, 4), ACCURACY)
    assert (found.value, found.low, found.high) == (10.0, 5.0, 15.0)
    assert harm(of(0.75), of(0.5), MSE).value == 0.25
    assert math.isnan(harm(Score(), of(0.5), MSE).value)


@pytest.mark.parametrize(
    ("p", "u", "metric", "expected"),
    [
        (60.0, 80.0, ACCURACY, 25.0),
        (90.0, 80.0, ACCURACY, -12.5),
        (0.75, 0.5, MSE, 50.0),
        (1.0, 0.0, ACCURACY, math.nan),
    ],
)
def test_sgrc_by_hand(p, u, metric, expected):
    assert sgrc(p, u, metric) == pytest.approx(expected, nan_ok=True)


def test_curves_are_aligned_within_the_range_that_all_cover():
    curves = {"a": curve((0, 0), (10, 10), (20, 20)), "b": curve((5, 1), (15, 1), (18, math.nan)), "c": curve()}
    found = align(pd.DataFrame(curves))
    assert found.index.tolist() == [5, 10, 15]
    assert found.T.to_numpy().tolist() == [[5, 10, 15], [1, 1, 1]]
    assert align(pd.DataFrame({"a": curve((0, 1)), "b": curve((5, 1))})).empty
    assert align(pd.DataFrame()).empty


UNPROTECTED = curve((0, 10), (50, 60), (100, 60))


@pytest.mark.parametrize(
    ("protected", "metric", "expected"),
    [
        # Relative differences 0, 5 / 6 and 1 / 2: ((0 + 5 / 6) / 2 + (5 / 6 + 1 / 2) / 2) / 2.
        (curve((0, 10), (50, 10), (100, 30)), ACCURACY, 100 * 13 / 24),
        (curve((0, 10), (50, 10), (100, 30)), MSE, -100 * 13 / 24),
        (curve((0, 1)), ACCURACY, math.nan),
        (curve(), ACCURACY, math.nan),
    ],
)
def test_signed_rfd_by_hand(protected, metric, expected):
    assert signed_rfd(protected, UNPROTECTED, metric) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("level", "metric", "expected"),
    [(35, ACCURACY, 25.0), (60, ACCURACY, 50.0), (10, ACCURACY, 0.0), (61, ACCURACY, math.nan), (5, MSE, math.nan)],
)
def test_steps_to_a_level_by_hand(level, metric, expected):
    assert steps_to(UNPROTECTED, level, metric) == pytest.approx(expected, nan_ok=True)
    assert math.isnan(steps_to(curve(), level, metric))


def test_signed_rfd_of_nothing_is_not_known():
    assert math.isnan(signed_rfd(UNPROTECTED, curve((0, 0), (100, 60)), ACCURACY))
