"""What is asked of an audit, and what is said where it does not come to it."""

from __future__ import annotations

import math

import pytest

from sophon.auditing.gate import failures
from sophon.auditing.scores import Difference
from sophon.auditing.summary import Intactness
from sophon.config import GateConfig
from tests.auditing.records import MSE, attempt, audit, idle, trio

HOLDS = trio("a", 50.0, 60.0, 50.0)
WEAKENED = trio("a", 57.0, 60.0, 50.0)
UNCLEAR = trio("a", 50.0, 60.0, 50.0, error=20.0)
DENOISER = Intactness(MSE, 0.040, 0.041, Difference(0.001, 0.0, 0.002), 50)


@pytest.mark.parametrize(
    ("gate", "attempts", "context", "said"),
    [
        ({}, WEAKENED, {}, []),
        ({"worst_case": 0.9, "intactness": 1.0}, HOLDS, {}, []),
        ({"worst_case": 0.2}, WEAKENED, {}, []),
        ({"worst_case": 0.9}, WEAKENED, {}, ["gate.worst_case: gap closed of 'a', 0.30 [0.30, 0.30], is below 0.9"]),
        ({"worst_case": 0.9}, UNCLEAR, {}, ["gap closed of 'a', 1.00 "]),
        ({"worst_case": 0.9}, trio("a", math.nan, 60.0, 50.0), {}, ["cannot be judged"]),
        ({"worst_case": 0.9}, idle(1.0, 2.0, 3.0), {}, ["gate.worst_case: no attack was tried"]),
        ({"removal": 0.9}, HOLDS, {}, ["gate.removal: no filtered model was attacked; give filtered=[DIR]"]),
        ({"removal": 0.9}, [*HOLDS, attempt("a", "filtered", 49.0)], {}, []),
        (
            {"removal": 0.9},
            [*HOLDS, attempt("a", "filtered", 40.0)],
            {},
            ["R 0.50 [0.50, 0.50], is below 0.9"],
        ),
        ({"intactness": 0.5}, HOLDS, {}, ["gate.intactness: the original domain loses 0.70 points, more than 0.5"]),
        ({"intactness": 3.0}, HOLDS, {"intactness": DENOISER}, []),
        ({"intactness": 2.0}, HOLDS, {"intactness": DENOISER}, ["loses 2.50 %, more than 2"]),
        ({"intactness": 2.0}, HOLDS, {"intactness": None}, ["gate.intactness: intactness was not measured"]),
        ({"worst_case": 0.9, "intactness": 0.5}, WEAKENED, {}, ["gate.worst_case: ", "gate.intactness: "]),
    ],
)
def test_what_an_audit_does_not_come_to_is_said(gate, attempts, context, said):
    found = failures(GateConfig(**gate), audit(attempts, **context))
    assert len(found) == len(said)
    assert all(words in line for words, line in zip(said, found, strict=True))
