import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon.audit.scores import (
    Cost,
    ci95,
    gap_closed,
    harm,
    overhead,
    points,
    resample,
    sgrc,
    signed_area,
    steps_to,
    student_t,
    value_at,
)
from tests.audit.records import ACCURACY, MSE, curve


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.7062), (4, 2.7764), (30, 2.0423), (31, 2.0395), (100, 1.9840)]
)
def test_student_t_matches_published_tables(freedom, expected):
    assert student_t(freedom) == pytest.approx(expected, abs=1e-4)


def test_ci95_by_hand_and_without_a_second_value():
    # Standard deviation 1, n 3, t(2) = 4.3027.
    assert ci95([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / math.sqrt(3))
    assert ci95([1.0]) is None
    assert ci95([]) is None


def test_gap_closed_by_hand():
    gap = gap_closed([70.0], [80.0], [60.0], ACCURACY)
    assert gap == {"value": 0.5, "ci95": None, "reason": None}
    assert gap_closed([50.0], [80.0], [60.0], ACCURACY)["value"] == 1.5
    assert gap_closed([0.5], [0.25], [0.75], MSE)["value"] == 0.5


def test_gap_closed_interval_brackets_the_value_and_is_reproducible():
    seeds = ([68.0, 70.0, 72.0], [79.0, 80.0, 81.0], [59.0, 60.0, 61.0])
    gap = gap_closed(*seeds, ACCURACY)
    low, high = gap["ci95"]
    assert low < gap["value"] < high
    # The extremes that resampling can reach: (79 - 72) / (79 - 59) and so on.
    assert 0.2 < low < 0.5 < high < 0.8
    assert gap_closed(*seeds, ACCURACY) == gap
    assert gap_closed(*seeds[:2], [60.0], ACCURACY)["ci95"] is None


def test_gap_closed_interval_is_withheld_where_the_denominator_may_vanish():
    gap = gap_closed([50.0, 50.0], [50.0, 70.0], [55.0, 56.0], ACCURACY)
    assert gap["value"] is not None
    assert gap["ci95"] is None


@pytest.mark.parametrize(
    ("unprotected", "scratch", "metric"),
    [(60.9, 60.0, ACCURACY), (55.0, 60.0, ACCURACY), (0.5, 0.504, MSE), (0.6, 0.5, MSE), (0.0, 0.0, MSE)],
)
def test_gap_closed_needs_a_clear_gap_in_the_right_direction(unprotected, scratch, metric):
    gap = gap_closed([1.0, 2.0], [unprotected], [scratch], metric)
    assert gap == {"value": None, "ci95": None, "reason": "unprotected is not clearly better than scratch"}


def test_gap_closed_names_missing_roles():
    assert gap_closed([1.0], [], [], ACCURACY)["reason"] == "no result of unprotected and scratch"


def test_sgrc_by_hand_in_both_directions():
    assert sgrc(60.0, 80.0, ACCURACY) == 25.0
    assert sgrc(90.0, 80.0, ACCURACY) == -12.5
    assert sgrc(0.75, 0.5, MSE) == 50.0
    assert sgrc(1.0, 0.0, ACCURACY) is None


def test_points_drop_what_is_not_finite_and_sort():
    rows = [{"step": 10, "select": 2.0}, {"step": 0, "select": 1.0}]
    rows += [{"step": 20, "select": value} for value in (None, math.nan, math.inf)]
    steps, values = points(rows)
    assert steps.tolist() == [0, 10]
    assert values.tolist() == [1, 2]
    assert len(points([])[0]) == 0


def test_resample_interpolates_within_the_common_range():
    steps, values = resample([curve((0, 0), (10, 10), (20, 20)), curve((5, 1), (15, 1)), curve()])
    assert steps.tolist() == [5, 10, 15]
    assert values.tolist() == [[5, 10, 15], [1, 1, 1]]
    assert resample([])[0].tolist() == []
    assert resample([curve((0, 1)), curve((5, 1))])[0].tolist() == []


def test_signed_area_by_hand():
    unprotected = curve((0, 10), (50, 60), (100, 60))
    protected = curve((0, 10), (50, 10), (100, 30))
    # Differences 0, 50, 30: (25 * 50 + 40 * 50) / 100.
    assert signed_area(protected, unprotected, ACCURACY) == pytest.approx(32.5)
    assert signed_area(protected, unprotected, MSE) == pytest.approx(-32.5)
    assert signed_area(curve((0, 1)), unprotected, ACCURACY) is None
    assert signed_area(curve(), unprotected, ACCURACY) is None


def test_steps_to_interpolates_the_first_crossing():
    up_and_down = curve((0, 10), (50, 30), (100, 20), (150, 40))
    assert steps_to(up_and_down, 20) == 25
    assert steps_to(up_and_down, 5) == 0
    assert steps_to(up_and_down, 41) is None
    assert steps_to(curve((0, 1.0), (10, 0.5)), 0.75, sign=-1) == 5


def test_overhead_by_hand():
    scratch, protected = curve((0, 10), (100, 60)), curve((0, 10), (200, 50))
    levels = overhead(protected, scratch, ACCURACY, (Cost(0.0, 6.0), Cost(0.0, 3.0)))
    assert list(levels) == ["50", "80", "95"]
    # Half way is 35: scratch at step 50, protected at step 125.
    assert levels["50"] == {
        "target": 35.0,
        "scratch_steps": 50.0,
        "steps": {"ratio": 2.5, "at_least": None},
        "flops": {"ratio": 5.0, "at_least": None},
    }
    assert levels["80"]["steps"] == {"ratio": pytest.approx(200 / 80), "at_least": None}
    # 57.5 is never reached in 200 steps; scratch needs 95.
    assert levels["95"]["steps"] == {"ratio": None, "at_least": pytest.approx(200 / 95)}
    assert levels["95"]["flops"] == {"ratio": None, "at_least": pytest.approx(400 / 95)}
    assert overhead(protected, scratch, ACCURACY)["50"]["flops"] == {"ratio": None, "at_least": None}


def test_overhead_in_flops_counts_what_came_before_the_first_step():
    scratch, protected = curve((0, 10), (100, 60)), curve((0, 10), (200, 50))
    levels = overhead(protected, scratch, ACCURACY, (Cost(1000.0, 2.0), Cost(50.0, 1.0)))
    # Half way: 1000 + 2 * 125 FLOPs against 50 + 50; the steps are those of fine-tuning alone.
    assert levels["50"]["flops"] == {"ratio": 12.5, "at_least": None}
    assert levels["50"]["steps"]["ratio"] == 2.5
    # Never reached: 1000 + 2 * 200 against 50 + 95.
    assert levels["95"]["flops"] == {"ratio": None, "at_least": pytest.approx(1400 / 145)}
    # A protected model that is good enough at once still had to be prepared.
    levels = overhead(curve((0, 60), (100, 60)), scratch, ACCURACY, (Cost(100.0, 2.0), Cost(0.0, 1.0)))
    assert (levels["50"]["steps"]["ratio"], levels["50"]["flops"]["ratio"]) == (0.0, 2.0)


def test_overhead_of_a_metric_that_falls():
    levels = overhead(curve((0, 1.0), (100, 0.5)), curve((0, 1.0), (50, 0.5)), MSE)
    assert [level["steps"]["ratio"] for level in levels.values()] == pytest.approx([2.0, 2.0, 2.0])


def test_overhead_is_none_without_anything_to_reach():
    learns, flat = curve((0, 10), (100, 60)), curve((0, 10), (100, 10.5))
    assert overhead(learns, flat, ACCURACY) is None
    assert overhead(learns, curve((0, 60), (100, 10)), ACCURACY) is None
    assert overhead(learns, curve((0, 60)), ACCURACY) is None
    assert overhead(curve(), learns, ACCURACY) is None


def test_many_seeds_use_the_normal_limit():
    rng = random.Random(0)
    values = [rng.gauss(50, 1) for _ in range(40)]
    assert ci95(values) == pytest.approx(2.0227 * np.std(values, ddof=1) / math.sqrt(40), rel=1e-4)


def test_value_at_interpolates_and_does_not_reach_beyond_the_curve():
    line = curve((0, 10), (50, 60))
    assert value_at(line, 25) == 35
    assert value_at(line, 50) == 60
    assert value_at(line, 51) is None
    assert value_at(line, -1) is None
    assert value_at(curve(), 0) is None


def test_harm_by_hand_in_both_directions():
    assert harm([70.0], [80.0], ACCURACY) == {"value": 10.0, "ci95": None}
    assert harm([0.75], [0.5], MSE)["value"] == 0.25
    assert harm([80.0, 80.0], [70.0], ACCURACY) == {"value": -10.0, "ci95": None}
    assert harm([], [70.0], ACCURACY) == harm([70.0], [], ACCURACY) == {"value": None, "ci95": None}


seeds = st.lists(st.floats(0, 100).map(lambda value: round(value, 3)), min_size=2, max_size=5)


@given(seeds, seeds)
def test_harm_interval_is_within_reach_reproducible_and_turns_with_the_metric(protected, unprotected):
    taken = harm(protected, unprotected, ACCURACY)
    low, high = taken["ci95"]
    assert min(unprotected) - max(protected) - 1e-9 <= low <= high <= max(unprotected) - min(protected) + 1e-9
    assert harm(protected, unprotected, ACCURACY) == taken
    turned = harm([-value for value in protected], [-value for value in unprotected], MSE)
    assert turned == taken
