"""Removal: its scores, and what the verdict says of it."""

import pytest

from sophon.auditing.gap_closed import Judgement
from sophon.auditing.results import results
from sophon.auditing.table import tabulate
from tests.auditing.records import attempt, audit, trio


def scored(*attempts):
    return results(tabulate([record for group in attempts for record in group]))


def verdict(attempts, **context):
    return audit(attempts, **context).verdict


@pytest.mark.parametrize(
    ("protected", "filtered", "error", "removal", "sentence"),
    [
        (
            60.5,
            60.0,
            0.0,
            Judgement.HOLDS,
            "It removes what the model had learnt of the restricted classes: fine-tuning a model that never saw the "
            "restricted classes gets to 60.0 % (R 0.97 [0.97, 0.97]).",
        ),
        (
            70.0,
            60.0,
            0.0,
            Judgement.WEAKENED,
            "It removes part of what the model had learnt of the restricted classes: ",
        ),
        (
            79.5,
            60.0,
            0.0,
            Judgement.BROKEN,
            "It removes nothing of what the model had learnt of the restricted classes: ",
        ),
        (55.0, 60.0, 0.0, Judgement.HOLDS, "gets to 60.0 % (R 1.25 (worse than filtered) [1.25, 1.25])."),
        (79.0, 79.5, 0.0, Judgement.UNKNOWN, "cannot be judged: unprotected is not clearly better than filtered."),
        (70.0, 60.0, 5.0, Judgement.UNKNOWN, "cannot be judged: the interval of R, ["),
        (
            70.0,
            60.0,
            9.0,
            Judgement.UNKNOWN,
            "cannot be judged: unprotected and filtered differ by less than the error of ",
        ),
    ],
)
def test_both_yardsticks_are_in_the_sentence(protected, filtered, error, removal, sentence):
    found = verdict([*trio("a", protected, 80.0, 40.0, error=error), attempt("a", "filtered", filtered, error=error)])
    assert found.removal == removal
    assert "training from scratch to 40.0 %" in found.sentence
    assert sentence in found.sentence
    assert found.sentence.startswith(f"Against scratch it is {found.word}, against a model that never saw the ")
    assert f" restricted classes {removal}. " in found.sentence
    assert verdict(trio("a", protected, 80.0, 40.0)).removal is None


@pytest.mark.parametrize(
    ("protected", "original", "said"),  # the protected model has 73.0 there
    [
        (55.0, 75.0, "it has 73.0 %, that model 75.0 %: its features may just be less trained."),
        (55.0, 72.0, ""),
        (60.5, 75.0, ""),
    ],
)
def test_removal_above_one_by_less_trained_features_is_said(protected, original, said):
    attempts = [*trio("a", protected, 80.0, 40.0), attempt("a", "filtered", 60.0)]
    sentence = verdict(attempts, filtered={"filtered": {"original": original}}).sentence
    assert sentence.endswith(said)
    assert ("less trained" in sentence) == bool(said)


def with_filtered(attack, *values, filtered, **more):
    """Return a trio with filtered models besides, ``filtered`` and ``filtered_2``."""
    roles = dict(zip(("filtered", "filtered_2"), filtered, strict=False))
    return trio(attack, *values, **more) + [attempt(attack, role, value, **more) for role, value in roles.items()]


def test_removal_is_measured_against_the_best_filtered_model():
    first = with_filtered("a", 70.0, 80.0, 40.0, filtered=(60.0, 65.0))
    found = scored(first, with_filtered("b", 60.0, 70.0, 30.0, filtered=(66.0, 40.0)))
    assert found.roles == ["protected", "unprotected", "filtered", "filtered_2", "scratch"]
    assert found.best_filtered == "filtered"  # 66 is more than 65
    assert [attack.removal.value for attack in found.attacks] == pytest.approx([0.5, 2.5])
    worst = found.worst_case["overall"]
    assert worst.own_best.attacks["filtered_2"] == "a"
    assert worst.own_best.removal.value == pytest.approx(10 / 14)  # 66 by the attack b
    assert worst.same_attack.removal.value == pytest.approx(0.5)
    assert worst.removal == worst.same_attack.removal
    assert worst.own_best.gap_closed.value == pytest.approx(10 / 40)


def test_without_a_filtered_model_there_is_no_removal():
    found = scored(trio("a", 70.0, 80.0, 40.0))
    assert found.roles == ["protected", "unprotected", "scratch"]
    assert found.best_filtered is found.attacks[0].removal is found.worst_case["overall"].removal is None
    assert found.worst_case["overall"].own_best.removal is None
