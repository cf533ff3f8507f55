import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sophon.auditing.gap_closed import Judgement
from sophon.auditing.results import results
from sophon.auditing.table import tabulate
from sophon.auditing.words import ROLES
from tests.auditing.records import ACCURACY, MSE, attempt, duo, idle, oracle, searched, trio

RENORMALISE = {"operation": "renormalise"}


def scored(*attempts):
    return results(tabulate([record for group in attempts for record in group]))


def by_name(found):
    return {attack.attack: attack for attack in found.attacks}


def test_an_attack_is_scored():
    found = scored(*(trio("sgd", 20.0 + seed, 60.0 + seed, 50.0 + seed, seed=seed) for seed in range(3)))
    (attack,) = found.attacks
    assert (attack.attack, attack.exposure, attack.strategy["lr"]) == ("sgd", "seen", 0.1)
    protected = attack.roles["protected"]
    assert (protected.mean, protected.half) == pytest.approx((21.0, 4.302653 / math.sqrt(3)))
    assert (protected.select, protected.values) == (21.0, (20.0, 21.0, 22.0))
    assert attack.gap_closed.value == 4.0
    assert attack.sgrc == pytest.approx(100 * 40 / 61)
    # The mean curves are straight lines from 10: to 61 and to 21; the relative difference is 0, then 40 of 61.
    assert attack.signed_rfd == pytest.approx(100 * 40 / 61 / 2)


def test_what_diverged_is_no_part_of_curves():
    lost = [attempt("a", "protected", 1.0, seed=1, select=60.0, finished=False)]
    assert scored(trio("a", 20.0, 60.0, 50.0), lost).attacks[0].signed_rfd == pytest.approx(100 / 3)


def test_controls_and_benign_attempts_are_no_attacks():
    attempts = trio("a", 20.0, 60.0, 50.0)
    alone, more = scored(attempts), scored(attempts, idle(99.0, 98.0, 97.0), [oracle(99.0)], duo("b", 90.0, 99.0))
    assert [alone.attacks, alone.worst_case, alone.families] == [more.attacks, more.worst_case, more.families]
    assert {role: found.mean for role, found in more.no_attack["none"].items()} == {
        "protected": 99.0,
        "unprotected": 98.0,
        "scratch": 97.0,
    }
    assert (alone.no_attack, alone.oracle, alone.benign, alone.worst_harm) == ({}, None, [], None)
    (benign,) = more.benign
    assert (benign.attack, benign.harm.value, list(benign.roles)) == ("b", 9.0, ["protected", "unprotected"])
    assert more.worst_harm == benign


def test_of_several_oracles_the_best_is_the_ceiling():
    found = scored(trio("a", 20.0, 60.0, 50.0), [oracle(88.0), oracle(90.0, 1), oracle(70.0, attack="b")]).oracle
    assert (found.attack, found.data_ratio, found.score.values) == ("a", 8.5, (88.0, 90.0))
    lost = [oracle(math.nan, attack="c")]
    assert math.isnan(scored(trio("a", 20.0, 60.0, 50.0), lost).oracle.score.mean)


def test_a_search_has_a_strategy_of_its_own_for_each_role():
    winners = searched("tpe", 55.0, 80.0, 60.0)
    for record, rate in zip(winners, (0.01, 0.02, 0.03), strict=True):
        record["strategy"] = record["strategy"] | {"lr": rate, "scope": "lora"}
    found = scored(winners, trio("a", 20.0, 60.0, 50.0))
    tpe = by_name(found)["tpe"]
    assert (tpe.strategy["lr"], tpe.trials, tpe.families) == (0.01, 64, ["search"])
    assert set(found.families) == {"search", "plain"}


# ---- worst cases ----------------------------------------------------------------------------------------------------


def test_a_worst_case_is_read_in_two_ways_and_figures_keep_their_attack():
    # centre gets most out of the protected model, reset out of the others: the case that once read 0.49 for both
    attempts = [
        trio("centre", 89.7, 91.5, 62.7, exposure="held_out"),
        trio("reset", 74.4, 94.2, 87.7, exposure="held_out"),
    ]
    worst = scored(*attempts).worst_case["overall"]
    assert worst.own_best.attacks == {"protected": "centre", "unprotected": "reset", "scratch": "reset"}
    assert worst.own_best.gap_closed.value == pytest.approx(4.5 / 6.5)
    assert set(worst.same_attack.attacks.values()) == {"centre"}
    assert worst.same_attack.gap_closed.value == pytest.approx(1.8 / 28.8)
    assert (worst.decided_by, worst.state, worst.deciding) == ("same_attack", Judgement.BROKEN, worst.same_attack)


@pytest.mark.parametrize(
    ("attempts", "decided", "state"),
    [
        # own best: 10 of 20, same attack: 10 of 40
        ([trio("a", 70, 80, 40), trio("b", 30, 70, 60)], "same_attack", Judgement.WEAKENED),
        # own best: 10 of 20, same attack: none, since scratch is as good
        ([trio("a", 70, 80, 79.5), trio("b", 30, 90, 70)], "own_best", Judgement.HOLDS),
        # a reading that breaks decides, though an uncertain one has the lower value
        ([trio("a", 79.5, 80, 60, error=0.5), trio("b", 30, 79, 78, error=9.0)], "same_attack", Judgement.BROKEN),
        ([trio("a", 79.5, 80, 79.5), trio("b", 30, 80, 79.5)], "own_best", Judgement.UNKNOWN),
    ],
)
def test_the_lower_reading_decides(attempts, decided, state):
    worst = scored(*attempts).worst_case["overall"]
    assert (worst.decided_by, worst.state) == (decided, state)


def test_the_best_attack_is_chosen_on_select_not_on_test():
    found = scored(trio("a", 20.0, 60.0, 50.0, select=70.0), trio("b", 59.0, 61.0, 51.0, select=30.0))
    assert found.worst_case["overall"].own_best.attacks["protected"] == "a"
    falling = scored(*(trio(n, 0.5, 0.1, 0.9, metric=MSE, select=s) for n, s in (("a", 0.7), ("b", 0.3))))
    assert falling.worst_case["overall"].own_best.attacks["protected"] == "b"


@pytest.mark.parametrize("present", [("protected",), ("protected", "unprotected"), ("scratch",)])
def test_roles_that_were_not_tried_are_missing(present):
    found = scored([one for one in trio("a", 20.0, 60.0, 50.0) if one["role"] in present])
    worst = found.worst_case["overall"]
    assert set(found.attacks[0].roles) == set(worst.own_best.roles) == set(present)
    assert worst.state == Judgement.UNKNOWN
    assert worst.own_best.gap_closed.reason.startswith("no result of")


def test_exposures_and_their_order():
    found = scored(trio("a", 20, 60, 50, exposure="held_out", outside=["lr"]), trio("b", 20, 60, 50), idle(1, 1, 1))
    assert [(attack.attack, attack.outside) for attack in found.attacks] == [("b", ""), ("a", "lr")]
    assert {name: worst.tried for name, worst in found.worst_case.items()} == {
        "overall": ["b", "a"],
        "seen": ["b"],
        "held_out": ["a"],
    }
    assert scored(idle(1, 1, 1)).worst_case == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"plain"}),
        ({"scope": "lora"}, {"lora"}),
        ({"scope": "last_blocks"}, {"partial"}),
        ({"data_budget": 100}, {"few_shot"}),
        ({"surgery": [{"operation": "noise"}], "scope": "head", "data_budget": 9}, {"surgery", "partial", "few_shot"}),
    ],
)
def test_families_by_what_sets_an_attack_apart(changes, expected):
    assert set(scored(trio("a", 20.0, 60.0, 50.0, strategy=changes)).families) == expected


# ---- lengths and masking --------------------------------------------------------------------------------------------


def lasting(name, steps, *values, **changes):
    return trio(name, *values, strategy={"steps": steps} | changes)


def test_decay_sets_lengths_side_by_side():
    short, long = lasting("short", 100, 50.0, 60.0, 50.0), lasting("long", 500, 55.0, 60.0, 50.0)
    others = [lasting("other", 500, 55.0, 60.0, 50.0, lr=0.2), searched("tpe", 1.0, 2.0, 3.0)]
    (found,) = scored(long, short, *others).decay
    assert (found.attacks, found.values) == (["short", "long"], [100, 500])
    assert found.sgrc == pytest.approx([100 / 6, 500 / 60])
    assert [gap.value for gap in found.gap_closed] == [1.0, 0.5]
    assert scored(short, *others).decay == []


def test_rates_and_images_are_axes_too():
    few = [trio(f"few{n}", 50.0, 60.0, 40.0, strategy={"data_budget": n, "batch_size": min(n, 64)}) for n in (500, 5)]
    rates = [trio(f"lr{lr}", 50.0, 60.0, 40.0, strategy={"lr": lr}) for lr in (0.5, 0.02)]
    all_of_them = trio("a", 50.0, 60.0, 40.0, strategy={"batch_size": 64})
    found = scored(*few, *rates, all_of_them)
    assert [(each.attacks, each.values) for each in found.shots] == [(["few5", "few500", "a"], [5, 500, None])]
    assert [each.values for each in found.rates] == [[0.02, 0.5]]
    assert found.decay == []


def test_recovery_is_how_long_a_model_takes_to_where_the_unprotected_one_ends():
    # curves are straight lines from 10 in 100 steps; a tenth of the gap below the unprotected one's end is 58
    (attack,) = scored(trio("a", 60.0, 60.0, 40.0)).attacks
    assert attack.recovery == pytest.approx({"protected": 96.0, "unprotected": 96.0, "scratch": math.nan}, nan_ok=True)
    (lower,) = scored(trio("a", 0.5, 0.5, 2.5, metric=MSE)).attacks
    assert lower.recovery["protected"] == pytest.approx(100 * (10 - 0.7) / 9.5)


def test_the_distillation_floor_is_the_best_student_of_original_images():
    def student(name, value, images):
        surgery = [{"operation": "distil", "steps": 9, "images": images}]
        return trio(name, value, 80.0, 60.0, strategy={"surgery": surgery})

    found = scored(student("a", 70.0, "original"), student("b", 65.0, "original"), student("c", 75.0, "attack"))
    assert found.distillation_floor.attacks["protected"] == "a"
    assert found.distillation_floor.gap_closed.value == 0.5
    assert scored(student("c", 75.0, "attack")).distillation_floor is None


def test_masking_is_what_taking_scale_away_undoes():
    reset, noise = {"operation": "reset_affine"}, {"operation": "noise", "scale": 0.1}
    per_channel = RENORMALISE | {"per": "channel"}
    kinds = {
        "plain": (40.0, {}),
        "renormalised": (65.0, {"surgery": [RENORMALISE]}),
        "reset": (60.0, {"surgery": [reset]}),
        "both": (75.0, {"surgery": [per_channel, reset]}),
        "noisy": (50.0, {"surgery": [noise]}),
        "noisy_renormalised": (45.0, {"surgery": [noise, RENORMALISE]}),
        "longer": (65.0, {"surgery": [RENORMALISE], "steps": 200}),  # has no other to stand beside
    }
    found = scored(*(trio(name, value, 75.0, 50.0, strategy=changes) for name, (value, changes) in kinds.items()))
    assert [(pair.attack, pair.without, pair.share) for pair in found.undone] == [
        ("both", "reset", 1.0),
        ("noisy_renormalised", "noisy", pytest.approx(-0.2)),
        ("renormalised", "plain", pytest.approx(1 - 0.4 / 1.4)),
    ]
    assert found.undone[0].operations == [per_channel]
    assert (found.undone[2].gap_closed, found.undone[2].gap_closed_without) == pytest.approx((0.4, 1.4))
    assert found.masked_share == found.undone[2].share  # the median


@pytest.mark.parametrize(("protected", "scratch"), [(73.0, 50.0), (75.5, 50.0), (40.0, 75.0)])
def test_where_nothing_protects_nothing_is_masked(protected, scratch):
    found = scored(
        trio("plain", protected, 75.0, scratch),
        trio("renormalised", 65.0, 75.0, 50.0, strategy={"surgery": [RENORMALISE]}),
    )
    assert math.isnan(found.undone[0].share)
    assert math.isnan(found.masked_share)


# ---- whatever the attempts are --------------------------------------------------------------------------------------

EXPOSURE = {"a": "seen", "b": "longer", "c": "held_out"}
numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
rows = st.lists(
    st.tuples(st.sampled_from("abc"), st.sampled_from(ROLES), st.integers(0, 3), numbers, numbers),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[:3],
)


def build(found, metric, factor=1):
    return [
        attempt(n, role, factor * test, seed=seed, select=factor * end, exposure=EXPOSURE[n], metric=metric, error=1.0)
        | {"curve": [{"step": 0, "select": factor * 10.0}, {"step": 100, "select": factor * end}]}
        for n, role, seed, test, end in found
    ]


@settings(max_examples=5)
@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_attempts_does_not_matter(found, rng):
    attempts = [*build(found, ACCURACY), *idle(12.0, 30.0, 10.0), oracle(88.0), *duo("a", 58.0, 60.0)]
    shuffled = random.Random(rng.random()).sample(attempts, len(attempts))
    assert repr(scored(attempts)) == repr(scored(shuffled))


@settings(max_examples=5)
@given(rows, st.sampled_from(["", "nats"]))
def test_turning_the_metric_round_changes_no_relative_score(found, unit):
    up, down = (type(ACCURACY)("m", unit, higher) for higher in (True, False))
    first, second = scored(build(found, up)), scored(build(found, down, -1))
    for one, other in zip(first.attacks, second.attacks, strict=True):
        for key in ("sgrc", "signed_rfd"):
            assert getattr(one, key) == pytest.approx(getattr(other, key), nan_ok=True)
        assert vars(one.gap_closed) == pytest.approx(vars(other.gap_closed), nan_ok=True)
    assert {n: w.state for n, w in first.worst_case.items()} == {n: w.state for n, w in second.worst_case.items()}
