import math
from dataclasses import replace

import pytest

from sophon.auditing.gap_closed import Judgement
from sophon.auditing.masking import Masking, Norms
from sophon.auditing.scores import Difference
from sophon.auditing.summary import Intactness
from tests.auditing.records import CONTEXT, MSE, attempt, audit, duo, searched, trio

BETTER = "training from scratch to"


def verdict(attempts, **context):
    return audit(attempts, **context).verdict


def said(attempts, **context):
    return " ".join(verdict(attempts, **context).findings)


@pytest.mark.parametrize(
    ("attempts", "word", "sentence"),
    [
        (
            trio("a", 79.0, 80.0, 60.0),
            Judgement.BROKEN,
            "Protection does not stop an attacker: fine-tuning the protected model gets an attacker to 79.0 % "
            "accuracy, fine-tuning the unprotected one to 80.0 % and training from scratch to 60.0 %.",
        ),
        (
            trio("a", 70.0, 80.0, 60.0),
            Judgement.WEAKENED,
            "Protection takes something from an attacker, but not all: fine-tuning the protected model gets an "
            "attacker to 70.0 % accuracy, ",
        ),
        (
            trio("a", 61.0, 80.0, 60.0),
            Judgement.HOLDS,
            "Protection leaves an attacker hardly better off than starting from ",
        ),
        (
            trio("a", 20.0, 80.0, 60.0),
            Judgement.HOLDS,
            "Protection leaves an attacker worse off than starting from scratch: ",
        ),
        (
            trio("a", 59.0, 80.0, 60.0, error=1.0),
            Judgement.HOLDS,
            "Protection leaves an attacker no better off than starting ",
        ),
        (
            trio("a", 0.5, 0.25, 0.75, metric=MSE),
            Judgement.WEAKENED,
            "Protection takes something from an attacker, but not all: fine-tuning the protected model gets an "
            "attacker to 0.5 eps-MSE (lower is better), fine-tuning the unprotected one to 0.25 and training from "
            "scratch to 0.75.",
        ),
        (
            trio("a", 70.0, 80.0, 60.0, error=6.0),
            Judgement.UNKNOWN,
            "These attacks do not tell whether protection holds: fine-tuning the protected model gets an attacker to "
            "70.0 % accuracy, fine-tuning the unprotected one to 80.0 % and training from scratch to 60.0 %, but the "
            "interval of gap closed, [-",
        ),
        (
            trio("a", 60.0, 80.0, 40.0, error=20.0, test_images=5),
            Judgement.UNKNOWN,
            "to 40.0 %, but unprotected and scratch differ by less than the error of 5 test images and 1 seed.",
        ),
        (
            trio("a", 70.0, 80.0, 79.5),
            Judgement.UNKNOWN,
            "do not tell whether protection holds: unprotected is not clearly better than scratch.",
        ),
        ([attempt("a", "protected", None)], Judgement.UNKNOWN, "no result of protected and unprotected and scratch."),
        (trio("a", 70.0, 80.0, 60.0, strategy={"steps": 0}), Judgement.UNKNOWN, "No attack was tried."),
    ],
)
def test_one_word_and_a_sentence(attempts, word, sentence):
    found = verdict(attempts)
    assert found.word == word
    assert sentence in found.sentence
    assert str(found) == f"{word}: {found.sentence}"


def test_both_readings_are_printed_with_their_definitions():
    attempts = trio("centre", 89.7, 91.5, 62.7) + searched("reset", 74.4, 94.2, 87.7)
    own, same, *_ = verdict(attempts).findings
    assert own == (
        "Each model under its own best attack: protected 89.7 % ('centre'), unprotected 94.2 % ('reset'), scratch "
        "87.7 % ('reset'); gap closed 0.69 [0.69, 0.69]."
    )
    assert same == (
        "The attack that gets most out of the protected model, on all models, 'centre' (adam at 0.1, 100 steps): "
        "protected 89.7 %, unprotected 91.5 %, scratch 62.7 %; gap closed 0.06 [0.06, 0.06]."
    )
    assert "'s' (best of 64 searched trials, adam at 0.1, 100 steps)" in said(searched("s", 70.0, 80.0, 60.0))
    assert "gap closed 1.50 (worse than scratch) [1.50, 1.50]" in said(trio("a", 50.0, 80.0, 60.0))


@pytest.mark.parametrize(
    ("attempts", "basis"),
    [
        (
            trio("a", 70.0, 80.0, 60.0) + searched("s", 1.0, 2.0, 3.0, trials=7),
            "1000 test images, 1 seed, 2 attacks and 7 searched trials; intervals know nothing of what other seeds "
            "would give",
        ),
        (
            [a for seed in range(2) for a in trio("a", 70.0, 80.0, 60.0, seed=seed, test_images=1)],
            "1 test image, 2 seeds and 1 attack",
        ),
    ],
)
def test_what_it_rests_on(attempts, basis):
    assert verdict(attempts).basis == basis


SEEN, HELD_OUT = trio("a", 20.0, 60.0, 50.0), trio("b", 69.0, 70.0, 50.0, exposure="held_out")


@pytest.mark.parametrize(
    ("attempts", "context", "words"),
    [
        (
            SEEN + HELD_OUT,
            {},
            "By what protection simulated: HOLDS against simulated attackers (gap closed 4.00 (worse than scratch) "
            "[4.00, 4.00]); BROKEN against held-out attacks (gap closed 0.05 [0.05, 0.05]).",
        ),
        (SEEN + HELD_OUT, {"support": None}, None),
        (SEEN, {}, None),
    ],
)
def test_whom_it_holds_against(attempts, context, words):
    text = said(attempts, **context)
    assert words in text if words else "simulated" not in text


@pytest.mark.parametrize(
    ("left", "words"), [(74.8, "it is BROKEN ('r', gap closed 0.01 "), (65.0, "it is WEAKENED ('r', "), (45.0, None)]
)
def test_a_family_that_leaves_less_than_the_luckiest_attack_is_named(left, words):
    """The attack that looks best on select is another one."""
    surgery = {"surgery": [{"operation": "noise"}]}
    attempts = trio("a", 40.0, 75.0, 50.0, select=76.0) + trio("r", left, 75.0, 50.0, select=74.0, strategy=surgery)
    text = said(attempts)
    assert f"Against the family 'surgery' alone {words}" in text if words else "family" not in text


def lasting(name, steps, value):
    return trio(name, value, 60.0, 50.0, strategy={"steps": steps}, select=value)


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((50.0, 55.0), "It wears off: gap closed 1.00 after 100 steps, 0.50 after 500."),
        ((55.0, 54.0), None),
        ((50.9, 51.1), None),  # crosses a threshold, but hardly moves
        ((54.0, math.nan), None),
        ((50.0, 59.5), None),  # the word says it
    ],
)
def test_wearing_off(ends, words):
    text = said(lasting("short", 100, ends[0]) + lasting("long", 500, ends[1]))
    assert words in text if words else "wears off" not in text


@pytest.mark.parametrize(
    ("metric", "values", "error", "words"),
    [
        (
            None,
            (58.0, 60.0),
            0.1,
            "costs 0.7 points (73.0 % after 73.7 %), and benign fine-tuning up to 2.0 points ('b').",
        ),
        (None, (58.0, 60.0), 1.0, None),  # within the error of the images
        (None, (59.5, 60.0), 0.0, None),
        (None, (70.0, 60.0), 0.0, None),
        (None, (math.nan, 60.0), 0.0, None),
        (MSE, (0.26, 0.25), 0.0, "benign fine-tuning up to 0.01 ('b'), 4.0 %."),
        (MSE, (0.251, 0.25), 0.0, None),
    ],
)
def test_cost(metric, values, error, words):
    more = {"metric": metric} if metric else {}
    text = said(trio("a", 60.0, 60.0, 50.0, **more) + duo("b", *values, error=error, **more))
    assert words in text if words else "benign" not in text


def test_intactness_has_its_own_metric_or_was_not_measured():
    kept = Intactness(MSE, 0.25, 0.5, Difference(0.25, 0.2, 0.3), 10)
    assert "On the original domain protection costs 0.25 (0.5 after 0.25)." in said(SEEN, intactness=kept)
    assert "Intactness was not measured." in said(SEEN, intactness=None)


# ---- masking --------------------------------------------------------------------------------------------------------


def weights(mean, most=None):
    return Masking([Norms("layers", 3, mean, mean, most or mean)] if mean else [], [], {})


def pair(undone, **more):
    """Attacks of which one takes scale away, and with it ``undone`` of a gap closed of 0.6."""
    after = 75.0 - 25 * 0.6 * (1 - undone)
    return trio("plain", 60.0, 75.0, 50.0, **more) + trio(
        "r", after, 75.0, 50.0, strategy={"surgery": [{"operation": "renormalise", "per": "channel"}]}, **more
    )


UNDONE = "after re-normalising the weights with per channel instead of 0.60)."
RUN = "which may be masking: run the family surgery."


@pytest.mark.parametrize(
    ("attempts", "measured", "words"),
    [
        (pair(0.9), weights(3.14), "Most of it is masking (weights before normalisation are 3.1 times as large, gap "
         f"closed 0.06 {UNDONE}"),
        (pair(0.51), weights(1.05), f"Most of it is masking (gap closed 0.29 {UNDONE}"),
        (pair(0.3), None, f"Part of it is masking (gap closed 0.42 {UNDONE}"),
        (pair(0.2), weights(3.14), None),
        (pair(0.9, error=9.0), weights(1.05), None),  # the protection that it would undo is within its error
        (SEEN, weights(3.14), f"Its weights before normalisation are 3.1 times as large, {RUN}"),
        (SEEN, weights(1234.5), "are 1234 times as large"),
        (SEEN, weights(1.2, 6.6), f"are up to 6.6 times as large, {RUN}"),
        (SEEN, weights(1.9), None),
        (SEEN, weights(0.2), None),
        (SEEN, weights(None), None),
        (SEEN, None, None),
    ],
)  # fmt: skip
def test_how_much_is_masking(attempts, measured, words):
    text = said(attempts, masking=measured)
    assert words in text if words else "masking" not in text and "normalisation" not in text


def test_context_changes_no_word():
    assert verdict(SEEN).word == verdict(SEEN, **vars(replace(CONTEXT, support=None, masking=weights(9.0)))).word
