import copy
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon.audit.metrics import summarise
from sophon.errors import UserError
from tests.audit.records import ACCURACY, CONTEXT, MSE, attempt, benign, idle, lasting, oracle, search, trio


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


def test_context_is_passed_on():
    given_ = {"feature_network": "Inception-v3 (FID)", "gallery": [{"title": "real", "file": "samples/real.png"}]}
    given_ |= {"left_out": {"lora": "no layer fits"}, "hashes": {"restricted": {"test": "ab"}}}
    attempts = trio("a", 20.0, 60.0, 50.0)
    summary = summarise(attempts, CONTEXT | given_)
    assert {key: summary[key] for key in given_} == given_
    assert summary["schema_version"] == 1
    without = summarise(attempts, CONTEXT)
    assert (without["feature_network"], without["gallery"]) == (None, None)


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
    attempts += [*idle(12.0, 30.0, 10.0), oracle(88.0), oracle(90.0, seed=1), *benign("a", 58.0, 60.0)]
    attempts += [*benign("b", 58.0, 60.0), *lasting("y", 100, 50.0, 60.0, 50.0), *lasting("x", 500, 58.0, 60.0, 50.0)]
    shuffled = list(attempts)
    rng.shuffle(shuffled)
    assert summarise(attempts, CONTEXT) == summarise(shuffled, CONTEXT)


@given(records, st.sampled_from(["%", "", "nats"]))
def test_turning_the_metric_round_changes_no_relative_score(rows, unit):
    up = {"name": "m", "unit": unit, "higher_is_better": True}
    first = summarise(build(rows, up), CONTEXT)
    second = summarise(build(rows, up | {"higher_is_better": False}, factor=-1), CONTEXT)
    for one, other in zip(first["attacks"], second["attacks"], strict=True):
        for key in ("gap_closed", "sgrc", "signed_area", "horizons"):
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


# ---- searches, controls, benign transfer ----------------------------------------------------------------------------


def test_controls_and_benign_attempts_are_no_attacks():
    attempts = trio("a", 20.0, 60.0, 50.0)
    alone = summarise(attempts, CONTEXT)
    assert (alone["controls"]["no_attack"], alone["controls"]["oracle"], alone["benign"]) == ({}, None, None)
    more = summarise([*attempts, *idle(99.0, 99.0, 99.0), oracle(99.0), *benign("b", 99.0, 99.0)], CONTEXT)
    for key in ("attacks", "worst_case", "families", "decay"):
        assert more[key] == alone[key]
    assert more["worst_case"]["overall"]["tried"] == ["a"]


def test_models_that_were_not_attacked():
    summary = summarise([*trio("a", 20.0, 60.0, 50.0), *idle(12.0, 30.0, 10.0)], CONTEXT)
    roles = summary["controls"]["no_attack"]["none"]
    assert {role: (found["mean"], found["n"]) for role, found in roles.items()} == {
        "protected": (12.0, 1),
        "unprotected": (30.0, 1),
        "scratch": (10.0, 1),
    }


def test_controls_alone_make_no_audit_but_a_summary():
    summary = summarise(idle(12.0, 30.0, 10.0), CONTEXT)
    assert summary["attacks"] == []
    assert summary["worst_case"]["overall"] is None
    assert summary["controls"]["tuned_scratch"] is None
    assert summary["verdict"].startswith("Protection cannot be judged (no attack was tried)")


def test_oracle_is_scored_with_its_data():
    found = summarise([*trio("a", 20.0, 60.0, 50.0), oracle(88.0), oracle(90.0, seed=1)], CONTEXT)["controls"]["oracle"]
    assert {key: found[key] for key in ("attack", "data_ratio", "mean", "n", "values")} == {
        "attack": "a", "data_ratio": 8.5, "mean": 89.0, "n": 2, "values": [88.0, 90.0],
    }  # fmt: skip
    assert found["ci95"] == pytest.approx(12.7062)


def test_of_several_oracles_the_best_is_the_ceiling():
    others = [oracle(70.0) | {"attack": "b"}, oracle(math.nan) | {"attack": "c"}]
    summary = summarise([*trio("a", 20.0, 60.0, 50.0), oracle(88.0), *others], CONTEXT)
    assert summary["controls"]["oracle"]["attack"] == "a"


def test_tuned_scratch_is_scratch_at_its_best():
    summary = summarise(trio("a", 20.0, 60.0, 50.0) + trio("b", 30.0, 70.0, 40.0), CONTEXT)
    tuned = summary["controls"]["tuned_scratch"]
    assert (tuned["attack"], tuned["mean"], tuned["strategy"]) == ("a", 50.0, {"optimizer": "adam", "lr": 0.1})


def test_a_search_has_a_strategy_for_each_role():
    winners = {"protected": (55.0, 0.01), "unprotected": (80.0, 0.02), "scratch": (60.0, 0.03)}
    summary = summarise(search("tpe", winners) + trio("a", 20.0, 60.0, 50.0), CONTEXT)
    by_name = {one["attack"]: one for one in summary["attacks"]}
    assert {role: one["lr"] for role, one in by_name["tpe"]["strategies"].items()} == {
        "protected": 0.01,
        "unprotected": 0.02,
        "scratch": 0.03,
    }
    assert by_name["tpe"]["strategy"]["lr"] == 0.01
    assert by_name["tpe"]["search"]["trials"] == 64
    assert (by_name["a"]["strategies"], by_name["a"]["search"]) == (None, None)
    assert summary["controls"]["tuned_scratch"]["strategy"]["lr"] == 0.03


def test_trials_of_a_search_get_the_best_so_far():
    rows = [(1, "complete", 30.0), (0, "pruned", 90.0), (3, "failed", None), (2, "complete", 20.0), (4, "complete", 40)]
    trials = [{"number": n, "state": state, "value": value, "step": 9, "strategy": {}} for n, state, value in rows]
    role = {"trials": trials, "best": 4}
    given_ = {"name": "s", "sampler": "tpe", "trials": 5, "steps": 9, "roles": {"protected": role}}
    context = CONTEXT | {"searches": [given_]}
    before = copy.deepcopy(context)
    (found,) = summarise(trio("a", 20.0, 60.0, 50.0), context)["searches"]
    assert found["roles"]["protected"]["best_so_far"] == [None, 30.0, 30.0, 30.0, 40]
    assert [trial["number"] for trial in found["roles"]["protected"]["trials"]] == [0, 1, 2, 3, 4]
    assert {key: found[key] for key in ("name", "sampler", "trials", "steps")} == {
        key: given_[key] for key in ("name", "sampler", "trials", "steps")
    }
    assert context == before
    falling = [one | {"metric": MSE} for one in trio("a", 20.0, 60.0, 50.0)]
    (found,) = summarise(falling, context)["searches"]
    assert found["roles"]["protected"]["best_so_far"] == [None, 30.0, 20.0, 20.0, 20.0]
    assert summarise(falling, CONTEXT)["searches"] == []


def test_a_search_is_put_together_from_the_files_of_its_roles():
    trials = [{"number": 0, "state": "complete", "value": 30.0, "step": 9, "strategy": {}}]
    facts = {"name": "s", "sampler": "random", "steps": 9}
    records = [
        facts | {"role": role, "id": f"s-{role}", "budget": 1, "trials": trials, "best": 0, "attempts": []}
        for role in ("scratch", "protected", "unprotected")
    ]
    attempts = trio("a", 20.0, 60.0, 50.0)
    found = summarise(attempts, CONTEXT | {"searches": records})["searches"]
    course = {"trials": trials, "best": 0, "best_so_far": [30.0]}
    assert found == [facts | {"trials": 1, "roles": dict.fromkeys(("protected", "unprotected", "scratch"), course)}]
    assert list(found[0]["roles"]) == ["protected", "unprotected", "scratch"]
    assert summarise(attempts, CONTEXT | {"searches": records[::-1]})["searches"] == found
    assert summarise(attempts, CONTEXT | {"searches": found})["searches"] == found


def test_what_older_attempts_lack_has_its_default():
    attempts = trio("a", 20.0, 60.0, 50.0)
    facts = {"domain": "restricted", "search": None, "prepared_flops": 0.0}
    assert summarise(attempts, CONTEXT) == summarise([one | facts for one in attempts], CONTEXT)


def test_restricted_and_benign_attempts_may_share_a_name_but_not_a_strategy():
    attempts = trio("a", 20.0, 60.0, 50.0)
    elsewhere = benign("a", 58.0, 60.0, strategy={"optimizer": "sgd"})
    assert summarise(attempts + elsewhere, CONTEXT)["benign"]["attacks"][0]["strategy"] == {"optimizer": "sgd"}


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"role": "victim"}, "role 'victim' is not known; allowed: protected, unprotected, scratch, oracle"),
        ({"domain": "other"}, "domain 'other' is not known; allowed: restricted, benign"),
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
