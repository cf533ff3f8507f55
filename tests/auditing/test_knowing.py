"""The verdict's line on an attacker who knows how the model is protected."""

import pytest

from tests.auditing.records import CONTEXT, attempt, audit, trio

KNOWING = CONTEXT.config | {"attack": {"knowing": {"b": ["removal"], "c": ["removal", "noise"]}}}
RUN = [*trio("a", 61.0, 80.0, 60.0), *trio("b", 70.0, 80.0, 60.0, exposure="held_out")]


@pytest.mark.parametrize(
    ("attempts", "mechanisms", "line"),
    [
        (
            RUN,
            ["removal"],
            "An attacker who knows how it protects (removal) gets to 70.0 % with 'b': WEAKENED, gap closed 0.50 "
            "[0.50, 0.50].",
        ),
        (RUN, None, "An attacker who knows how it protects (removal) gets to 70.0 % with 'b': WEAKENED, "),
        (
            RUN,
            ["removal", "suppression"],
            " None was run against suppression; add +attack/family=[knowing_suppression].",
        ),
        ([*RUN, attempt("b", "filtered", 60.0)], ["removal"], "R 0.50 [0.50, 0.50]."),
        (
            RUN,
            ["suppression"],
            "An attacker who knows how it protects (suppression) was not run; add "
            "+attack/family=[knowing_suppression].",
        ),
        (RUN, ["mine"], "(mine) was not run; name attacks made against mine in attack.knowing."),
        (RUN, [], "An attacker who knows how it protects was not run; name attacks in attack.knowing."),
        # what was simulated is nothing that an attacker who knows would do
        (trio("b", 70.0, 80.0, 60.0), ["removal"], "(removal) was not run; "),
        ([attempt("b", "protected", None, exposure="held_out")], ["removal"], "(removal) diverged in every attempt."),
    ],
)
def test_there_is_a_line_on_the_attacker_who_knows(attempts, mechanisms, line):
    found = audit(attempts, mechanisms=mechanisms, config=KNOWING)
    assert line in found.verdict.knowing
    assert found.json()["verdict"]["knowing"] == found.verdict.knowing
    worst = found.json()["knowing"]["worst_case"]
    assert worst is None or worst["tried"] == ["b"]
