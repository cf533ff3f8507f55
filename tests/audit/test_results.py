import math

import pytest

from sophon.audit.metrics import summarise
from tests.audit.records import CONTEXT, MSE, attempt, benign, lasting, search, trio

# ---- scores and the worst case --------------------------------------------------------------------------------------


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


def test_benign_transfer_by_hand():
    attempts = trio("a", 20.0, 60.0, 50.0) + benign("a", 58.0, 60.0) + benign("b", 75.0, 70.0)
    found = summarise(attempts, CONTEXT)["benign"]
    assert [(one["attack"], one["harm"]["value"]) for one in found["attacks"]] == [("a", 2.0), ("b", -5.0)]
    assert found["attacks"][0]["sgrc"] == pytest.approx(100 * 2 / 60)
    assert found["worst_harm"] == {"attack": "a", "value": 2.0, "ci95": None, "sgrc": pytest.approx(100 * 2 / 60)}
    assert found["mean_harm"] == -1.5


def test_benign_transfer_that_failed_or_lacks_a_role():
    found = summarise(trio("a", 20.0, 60.0, 50.0) + benign("b", math.nan, 70.0), CONTEXT)["benign"]
    assert found["attacks"][0]["harm"] == {"value": None, "ci95": None}
    assert (found["worst_harm"], found["mean_harm"]) == (None, None)


# ---- horizons, decay, families, cost --------------------------------------------------------------------------------


def test_horizons_follow_the_curves():
    attempts = trio("a", 0.0, 0.0, 0.0)
    ends = {"protected": (10, 50), "unprotected": (60, 60), "scratch": (10, 40)}
    for one in attempts:
        start, end = ends[one["role"]]
        one["curve"] = [{"step": 0, "select": start}, {"step": 100, "select": end}]
    (attack,) = summarise(attempts, CONTEXT)["attacks"]
    # At 25 steps: protected 20, unprotected 60, scratch 17.5.
    assert attack["horizons"][0] == {
        "step": 25.0,
        "sgrc": pytest.approx(100 * 40 / 60),
        "gap_closed": pytest.approx(40 / 42.5),
    }
    assert [row["step"] for row in attack["horizons"]] == [25, 50, 75, 100]
    assert attack["horizons"][-1]["gap_closed"] == pytest.approx(10 / 20)


def test_horizons_without_curves_or_roles_are_undefined():
    attempts = [attempt("a", "protected", 20.0), attempt("a", "unprotected", 60.0)]
    for one in attempts:
        one["curve"] = [*one["curve"][:1], {"step": 60, "select": 50.0}]
    (attack,) = summarise(attempts, CONTEXT)["attacks"]
    assert [row["sgrc"] for row in attack["horizons"]] == [0.0, 0.0, None, None]
    assert [row["gap_closed"] for row in attack["horizons"]] == [None] * 4


def test_decay_sets_attacks_of_different_length_side_by_side():
    attempts = lasting("z", 100, 50.0, 60.0, 50.0) + lasting("a", 500, 58.0, 60.0, 50.0)
    attempts += lasting("other", 500, 50.0, 60.0, 50.0, lr=0.2) + lasting("none", 0, 10.0, 10.0, 10.0)
    (family,) = summarise(attempts, CONTEXT)["decay"]
    assert (family["attacks"], family["steps"]) == (["z", "a"], [100, 500])
    assert family["gap_closed"] == [1.0, pytest.approx(0.2)]
    assert family["sgrc"] == [pytest.approx(100 / 6), pytest.approx(10 / 3)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"plain"}),
        ({"scope": "lora"}, {"lora"}),
        ({"scope": "last_blocks"}, {"partial"}),
        ({"data_budget": 100}, {"few_shot"}),
        ({"surgery": [{"operation": "noise"}]}, {"surgery"}),
        ({"surgery": [{"operation": "noise"}], "scope": "head", "data_budget": 9}, {"surgery", "partial", "few_shot"}),
    ],
)
def test_families_by_what_sets_an_attack_apart(changes, expected):
    found = summarise(lasting("a", 100, 20.0, 60.0, 50.0, **changes), CONTEXT)["families"]
    assert set(found) == {"search", "surgery", "lora", "partial", "few_shot", "plain"}
    assert {name for name, worst in found.items() if worst} == expected
    assert all(found[name]["gap_closed"]["value"] == 4.0 for name in expected)


def test_a_search_is_a_family_of_its_own():
    attempts = search("s", dict.fromkeys(("protected", "unprotected", "scratch"), (50.0, 0.1)))
    found = summarise(attempts, CONTEXT)["families"]
    assert {name: worst["tried"] for name, worst in found.items() if worst} == {"search": ["s"]}


def test_overhead_counts_the_flops_of_preparation():
    attempts = trio("a", 35.0, 60.0, 60.0)
    attempts[0] |= {"flops": 3e6, "prepared_flops": 2e6}
    level = summarise(attempts, CONTEXT)["attacks"][0]["overhead"]["50"]
    # Scratch is half way at step 50 of 100 for 1e6 FLOPs, protected at step 100, after 2e6 FLOPs of preparation.
    assert level["steps"]["ratio"] == 2.0
    assert level["flops"]["ratio"] == pytest.approx(3e6 / 0.5e6)


@pytest.mark.parametrize("unknown", [{"flops": 0.0}, {"flops": math.nan}, {"prepared_flops": 1e6}])
def test_overhead_without_flops(unknown):
    attempts = trio("a", 35.0, 60.0, 60.0)
    attempts[0] |= unknown
    level = summarise(attempts, CONTEXT)["attacks"][0]["overhead"]["50"]
    assert level["flops"] == {"ratio": None, "at_least": None}
