import copy
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon.audit.metrics import (
    ci95,
    gap_closed,
    overhead,
    points,
    resample,
    sgrc,
    signed_area,
    steps_to,
    student_t,
    summarise,
)
from sophon.audit.verdict import format_difference, format_value
from sophon.errors import UserError

ACCURACY = {"name": "accuracy", "unit": "%", "higher_is_better": True}
MSE = {"name": "eps-MSE", "unit": "", "higher_is_better": False}
CONTEXT = {
    "checkpoint": {"path": "protected", "sha256": "ab", "method": "sophon", "name": "tiny"},
    "reference": {"path": "reference", "sha256": "cd"},
    "intactness": {
        "metric": "accuracy", "unit": "%", "higher_is_better": True, "before": {"test": 73.7}, "after": {"test": 73.0},
    },
    "support": {"optimizer": {"momentum": [0.001, 0.1]}, "steps": [20, 20]},
    "domains": {"original": "a", "restricted": "b"},
    "config": {"seeds": 1},
    "packages": {"torch": "2"},
}  # fmt: skip


def attempt(attack, role, test, *, seed=0, select=None, exposure="seen", outside=(), metric=ACCURACY, **more):
    end = test if select is None else select
    return {
        "schema_version": 1, "id": f"{attack}-{role}-{seed}", "attack": attack, "role": role, "seed": seed,
        "strategy": {"optimizer": "adam", "lr": 0.1}, "exposure": exposure, "outside": list(outside), "metric": metric,
        "curve": [{"step": 0, "select": 10.0}, {"step": 100, "select": end}], "test": test, "seconds": 1.5,
        "flops": 1e6, "steps": 100,
    } | more  # fmt: skip


def trio(attack, protected, unprotected, scratch, **more):
    values = {"protected": protected, "unprotected": unprotected, "scratch": scratch}
    return [attempt(attack, role, value, **more) for role, value in values.items()]


def curve(*pairs):
    return np.array([step for step, _ in pairs], float), np.array([value for _, value in pairs], float)


# ---- numbers --------------------------------------------------------------------------------------------------------


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
    levels = overhead(protected, scratch, ACCURACY, flops_ratio=2.0)
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


def test_overhead_of_a_metric_that_falls():
    levels = overhead(curve((0, 1.0), (100, 0.5)), curve((0, 1.0), (50, 0.5)), MSE)
    assert [level["steps"]["ratio"] for level in levels.values()] == pytest.approx([2.0, 2.0, 2.0])


def test_overhead_is_none_without_anything_to_reach():
    learns, flat = curve((0, 10), (100, 60)), curve((0, 10), (100, 10.5))
    assert overhead(learns, flat, ACCURACY) is None
    assert overhead(learns, curve((0, 60), (100, 10)), ACCURACY) is None
    assert overhead(learns, curve((0, 60)), ACCURACY) is None
    assert overhead(curve(), learns, ACCURACY) is None


def test_values_in_words():
    assert format_value(41.04, ACCURACY) == "41.0 %"
    assert format_value(0.0123456, MSE) == "0.01235"
    assert format_value(None, MSE) == "-"
    assert format_difference(0.7, ACCURACY) == "0.7 points"


# ---- the summary ----------------------------------------------------------------------------------------------------


def test_summary_scores_an_attack():
    attempts = [a for seed in range(3) for a in trio("sgd", 20.0 + seed, 60.0 + seed, 50.0 + seed, seed=seed)]
    summary = summarise(attempts, CONTEXT)
    (attack,) = summary["attacks"]
    assert attack["attack"] == "sgd"
    assert attack["strategy"] == {"optimizer": "adam", "lr": 0.1}
    assert attack["exposure"] == "seen"
    assert attack["roles"]["protected"] == {
        "mean": 21.0,
        "ci95": pytest.approx(4.3027 / math.sqrt(3)),
        "n": 3,
        "values": [20.0, 21.0, 22.0],
        "failed": 0,
        "select": 21.0,
        "details": {},
    }
    assert attack["gap_closed"]["value"] == 4.0
    assert attack["sgrc"] == pytest.approx(100 * 40 / 61)
    # The mean curves are straight lines from 10: to 61 and to 21.
    assert attack["signed_area"] == pytest.approx(20.0)
    assert attack["overhead"]["80"]["steps"]["at_least"] == pytest.approx(100 / 80)
    assert summary["intactness"]["loss"] == pytest.approx(0.7)
    assert summary["seconds_total"] == pytest.approx(13.5)
    assert summary["packages"] == {"torch": "2"}


def test_further_measurements_are_means_of_what_was_measured():
    def measured(seed, **details):
        return attempt("a", "protected", 0.5, seed=seed, metric=MSE, details=details)

    attempts = [
        measured(0, low=1.0, high=None, **{"Frechet distance": 7.0}),
        measured(1, low=2.0, high=None),
        measured(2, low=99.0) | {"finished": False},
        attempt("a", "unprotected", 0.1, metric=MSE),
        attempt("a", "scratch", math.nan, metric=MSE, details={"low": 1.0}),
    ]
    roles = summarise(attempts, {})["attacks"][0]["roles"]
    assert roles["protected"]["details"] == {"low": 1.5, "high": None, "Frechet distance": 7.0}
    assert list(roles["protected"]["details"]) == ["low", "high", "Frechet distance"]
    assert roles["unprotected"]["details"] == roles["scratch"]["details"] == {}
    turned = summarise(attempts[::-1], {})["attacks"][0]["roles"]
    assert list(turned["protected"]["details"].items()) == list(roles["protected"]["details"].items())


@pytest.mark.parametrize("details", [None, {}, {"low": None}, {"low": math.inf}])
def test_further_measurements_that_are_missing(details):
    (attack,) = summarise([attempt("a", "protected", 0.5, details=details)], {})["attacks"]
    assert attack["roles"]["protected"]["details"] == dict.fromkeys(details or ())
    assert attack["roles"]["protected"]["mean"] == 0.5


def test_context_of_generating_models_is_passed_on():
    given_ = {"feature_network": "Inception-v3 (FID)", "gallery": [{"title": "real", "file": "samples/real.png"}]}
    attempts = trio("a", 20.0, 60.0, 50.0)
    summary = summarise(attempts, CONTEXT | given_)
    assert {key: summary[key] for key in given_} == given_
    assert summary["schema_version"] == 1
    without = summarise(attempts, CONTEXT)
    assert (without["feature_network"], without["gallery"]) == (None, None)


def test_worst_case_is_chosen_on_select_and_reported_on_test():
    attempts = trio("a", 30.0, 60.0, 50.0) + trio("b", 20.0, 70.0, 40.0)
    for one in attempts:
        # On select, b is the protected model's worst although a is on test.
        one["curve"][-1]["select"] = 99.0 if one["attack"] == "b" and one["role"] == "protected" else one["test"]
    worst = summarise(attempts, CONTEXT)["worst_case"]["overall"]
    assert worst["attacks"] == 2
    assert {role: (best["attack"], best["mean"]) for role, best in worst["roles"].items()} == {
        "protected": ("b", 20.0),
        "unprotected": ("b", 70.0),
        "scratch": ("a", 50.0),
    }
    assert worst["gap_closed"]["value"] == 2.5


def test_worst_case_of_a_metric_that_falls():
    attempts = trio("a", 0.5, 0.2, 0.6, metric=MSE) + trio("b", 0.3, 0.25, 0.4, metric=MSE)
    roles = summarise(attempts, CONTEXT)["worst_case"]["overall"]["roles"]
    assert {role: best["mean"] for role, best in roles.items()} == {
        "protected": 0.3,
        "unprotected": 0.2,
        "scratch": 0.4,
    }


def test_exposure_groups_are_apart():
    attempts = trio("a", 20.0, 60.0, 50.0) + trio("b", 58.0, 62.0, 50.0, exposure="held_out", outside=["lr"])
    summary = summarise(attempts, CONTEXT)
    assert [(a["attack"], a["outside"]) for a in summary["attacks"]] == [("a", []), ("b", ["lr"])]
    worst = summary["worst_case"]
    assert worst["seen"]["gap_closed"]["value"] == 4.0
    assert worst["longer"] is None
    assert worst["held_out"]["gap_closed"]["value"] == pytest.approx(4 / 12)


@pytest.mark.parametrize("spoilt", [{"test": None}, {"test": math.nan}, {"finished": False}, {"curve": []}])
def test_failed_attempts_are_counted_and_left_out(spoilt):
    attempts = [*trio("a", 20.0, 60.0, 50.0), attempt("a", "protected", 1.0, seed=1) | spoilt]
    summary = summarise(attempts, CONTEXT)
    scores = summary["attacks"][0]["roles"]["protected"]
    assert (scores["mean"], scores["n"], scores["failed"]) == (20.0, 1, 1)
    json.dumps(summary, allow_nan=False)


def test_nothing_but_failures():
    summary = summarise([attempt("a", "protected", math.inf)], CONTEXT)
    assert summary["attacks"][0]["roles"]["protected"]["mean"] is None
    assert "no result of the protected model" in summary["verdict"]


def test_summary_is_plain_json():
    context = CONTEXT | {"config": {"rates": (1, 2), "nothing": math.nan, 3: "key"}}
    summary = summarise(trio("a", 1e308, -1e308, 1e308), context)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["config"] == {"rates": [1, 2], "nothing": None, "3": "key"}


def test_summary_does_not_change_its_input():
    attempts = trio("a", 20.0, 60.0, 50.0)
    before = copy.deepcopy((attempts, CONTEXT))
    summarise(attempts, CONTEXT)
    assert (attempts, CONTEXT) == before


def test_seconds_are_in_one_key_only():
    attempts = trio("a", 20.0, 60.0, 50.0)
    slower = [one | {"seconds": 99.0} for one in attempts]
    first, second = summarise(attempts, CONTEXT), summarise(slower, CONTEXT)
    assert first.pop("seconds_total") != second.pop("seconds_total")
    assert first == second


numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
roles = st.sampled_from(["protected", "unprotected", "scratch"])
records = st.lists(
    st.tuples(st.sampled_from("abc"), roles, st.integers(0, 3), numbers, numbers, numbers),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[:3],
)
EXPOSURE = {"a": "seen", "b": "longer", "c": "held_out"}


def build(rows, metric, factor=1):
    return [
        attempt(name, role, factor * test, seed=seed, exposure=EXPOSURE[name], metric=metric)
        | {"curve": [{"step": 0, "select": factor * start}, {"step": 100, "select": factor * end}]}
        for name, role, seed, start, end, test in rows
    ]


@given(records, st.randoms(use_true_random=False))
def test_order_of_attempts_does_not_matter(rows, rng):
    attempts = build(rows, ACCURACY)
    shuffled = list(attempts)
    rng.shuffle(shuffled)
    assert summarise(attempts, CONTEXT) == summarise(shuffled, CONTEXT)


@given(records, st.sampled_from(["%", "", "nats"]))
def test_turning_the_metric_round_changes_no_relative_score(rows, unit):
    up = {"name": "m", "unit": unit, "higher_is_better": True}
    first = summarise(build(rows, up), CONTEXT)
    second = summarise(build(rows, up | {"higher_is_better": False}, factor=-1), CONTEXT)
    for one, other in zip(first["attacks"], second["attacks"], strict=True):
        for key in ("gap_closed", "sgrc", "signed_area"):
            assert one[key] == other[key]
        assert {level: found["steps"] for level, found in (one["overhead"] or {}).items()} == {
            level: found["steps"] for level, found in (other["overhead"] or {}).items()
        }
    for name, group in first["worst_case"].items():
        assert (group and group["gap_closed"]) == (
            second["worst_case"][name] and second["worst_case"][name]["gap_closed"]
        )


extremes = st.one_of(st.floats(), st.none(), st.sampled_from([0.0, 1e308, -1e308, 5e-324]))


@given(
    st.lists(st.tuples(roles, extremes, extremes, extremes), min_size=1, max_size=8), st.sampled_from([ACCURACY, MSE])
)
def test_extreme_values_give_plain_json_and_a_sentence(rows, metric):
    attempts = [
        attempt("a", role, test, seed=seed, metric=metric)
        | {"curve": [{"step": 0, "select": start}, {"step": 7, "select": end}]}
        for seed, (role, start, end, test) in enumerate(rows)
    ]
    summary = summarise(attempts, CONTEXT)
    json.dumps(summary, allow_nan=False)
    assert summary["verdict"].endswith(".")


# ---- the verdict ----------------------------------------------------------------------------------------------------


def test_verdict_that_holds_in_part():
    held_out = {"exposure": "held_out", "outside": ["optimizer"]}
    attempts = trio("sgd", 21.3, 60.1, 55.0) + trio("adam_0.005_fresh", 78.0, 80.1, 60.0, **held_out)
    assert summarise(attempts, CONTEXT)["verdict"] == (
        "Protection holds against the simulated kind of attacker ('sgd' reaches 21.3 %; unprotected 60.1 %, scratch "
        "55.0 %, gap closed 7.61), but only weakens held-out attacks ('adam_0.005_fresh' reaches 78.0 %; unprotected "
        "80.1 %, scratch 60.0 %, gap closed 0.10); intactness loss 0.7 points; some results rest on one seed."
    )


def test_verdict_names_what_breaks_it():
    attempts = trio("sgd", 21.3, 60.1, 55.0) + trio("adam", 79.0, 80.1, 60.0, exposure="held_out")
    assert (
        "but does not hold against held-out attacks ('adam' reaches 79.0 %" in summarise(attempts, CONTEXT)["verdict"]
    )


def test_verdict_says_no_protection_plainly():
    attempts = trio("a", 60.0, 60.1, 50.0) + trio("b", 69.5, 70.0, 50.0, exposure="longer", outside=["steps"])
    verdict = summarise(attempts, CONTEXT)["verdict"]
    assert verdict.startswith("No protection against the simulated kind of attacker ('a' reaches 60.0 %")
    assert "'b' reaches 69.5 %" in verdict


def test_verdict_without_a_sampler_speaks_of_all_attacks():
    attempts = trio("a", 59.9, 60.1, 50.0, exposure="held_out")
    verdict = summarise(attempts, CONTEXT | {"support": None, "intactness": None})["verdict"]
    assert verdict.startswith("No protection against the attacks that were tried ('a' ")
    assert "intactness was not measured" in verdict


@pytest.mark.parametrize("present", [("protected",), ("protected", "unprotected"), ("scratch",)])
def test_verdict_with_missing_roles(present):
    attempts = [one for one in trio("a", 20.0, 60.0, 50.0) if one["role"] in present]
    summary = summarise(attempts, CONTEXT)
    assert summary["verdict"].startswith("Protection cannot be judged (")
    assert set(summary["attacks"][0]["roles"]) == set(present)
    assert ("'a' reaches 20.0 %" in summary["verdict"]) == ("protected" in present)


def test_verdict_reports_a_group_that_cannot_be_judged():
    attempts = trio("a", 20.0, 60.0, 50.0) + trio("b", 20.0, 50.0, 50.0, exposure="held_out")
    assert (
        "; it cannot be judged against held-out attacks ('b' reaches 20.0 %; unprotected 50.0 %, scratch 50.0 %, "
        "unprotected is not clearly better than scratch)"
    ) in summarise(attempts, CONTEXT)["verdict"]


def test_intactness_follows_its_own_direction():
    given_ = {
        "metric": "eps-MSE",
        "unit": "",
        "higher_is_better": False,
        "before": {"test": 0.25},
        "after": {"test": 0.5},
    }
    summary = summarise(trio("a", 20.0, 60.0, 50.0), CONTEXT | {"intactness": given_})
    assert summary["intactness"]["loss"] == 0.25
    assert "intactness loss 0.25;" in summary["verdict"]


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "victim"}, "role 'victim' is not known; allowed: protected, unprotected, scratch"),
        ({"exposure": "new"}, "exposure 'new' is not known; allowed: seen, longer, held_out"),
        ({"schema_version": 2}, "schema_version 2 is not known; allowed: 1"),
        ({"metric": MSE}, "differs from the other attempts'"),
        ({"strategy": {"lr": 1}}, "attack 'a' was run with another strategy before; use a new run_dir"),
    ],
)
def test_attempts_that_do_not_fit_are_refused(change, message):
    attempts = trio("a", 20.0, 60.0, 50.0)
    attempts.append(attempts[0] | {"id": "odd"} | change)
    with pytest.raises(UserError, match="attempt 'odd': ") as error:
        summarise(attempts, CONTEXT)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_keys_and_missing_attempts_are_refused():
    one = attempt("a", "protected", 1.0)
    del one["curve"]
    with pytest.raises(UserError, match="no curve; needed are attack, curve"):
        summarise([one], CONTEXT)
    with pytest.raises(UserError, match="none found"):
        summarise([], CONTEXT)


def test_many_seeds_use_the_normal_limit():
    rng = random.Random(0)
    values = [rng.gauss(50, 1) for _ in range(40)]
    assert ci95(values) == pytest.approx(2.0227 * np.std(values, ddof=1) / math.sqrt(40), rel=1e-4)
