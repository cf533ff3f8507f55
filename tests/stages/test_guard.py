"""The guard: what it accepts, repairs, lets pass and takes back, by what it is told of ``val``."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sophon.errors import GuardError
from sophon.protection.runner import Runner
from tests.protection.staged import GUARD, METHOD, ORIGINAL, Scripted, rows, runner
from tests.tiny import state_of, tiny_model, tiny_task

NONE = {"repair_steps": 0}
LOWER = {"higher": False}
PERCENT = {"tolerance": 5.0, "relative": True}

# what val is, the reference first; the guard's keys; the task's; (val, repaired, accepted) of looks; (good, rollbacks)
LOOKS: dict[str, tuple[list[float], dict[str, Any], dict[str, Any], list[tuple[Any, ...]], tuple[int, int]]] = {
    "within tolerance": (
        [50, 49.0, 51, 49.5, 49], {}, {},
        [(49.0, False, True), (51, False, True), (49.5, False, True), (49, False, True)], (4, 0),
    ),
    "repaired": ([50, 40, 49.5], {}, {}, [(49.5, True, True), (50, False, True)], (4, 0)),
    "no repair": ([50, 40], NONE, {}, [(40, False, False), (50, False, True)], (4, 1)),
    "beyond repair": ([50, 50, 40, 41], {}, {}, [(50, False, True), (41, True, False), (50, False, True)], (4, 1)),
    "lower is better": (
        [0.5, 0.59, 0.1, 0.61, 0.61, 0.59], {"tolerance": 0.1}, LOWER,
        [(0.59, False, True), (0.1, False, True), (0.61, True, False), (0.59, False, True)], (4, 1),
    ),
    "percent": (
        [0.5, 0.52, 0.53, 0.53, 0.1, 0.526, 0.524], PERCENT, LOWER,
        [(0.52, False, True), (0.53, True, False), (0.1, False, True), (0.524, True, True)], (4, 1),
    ),
    "percent of a negative metric": (
        [-10, -9.6, -9, -10, -10], PERCENT | NONE, LOWER, [(-9.6, False, True), (-9, False, False)], (4, 1),
    ),
    "not a number": (
        [0.5, 0.5, math.nan, math.nan, 0.5, 0.5], {}, LOWER,
        [(0.5, False, True), (None, True, False), (0.5, False, True)], (4, 1),
    ),
    "patience": (
        [50, 50, 10, 11, 50], NONE | {"patience": 2}, {},
        [(50, False, True), (10, False, False), (11, False, False), (50, False, True)], (4, 0),
    ),
    "patience, and repair": ([50, 10, 10, 10, 50], {"patience": 5}, {}, [(10, True, False), (50, True, True)], (4, 0)),
    "out of patience": (
        [50, 50, 10, 11, 12], NONE | {"patience": 2}, {},
        [(50, False, True), (10, False, False), (11, False, False), (12, False, False)], (1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOKS)
def test_looks(case: str, tmp_path: Path) -> None:
    values, guard, task, expected, end = LOOKS[case]
    run = runner(tmp_path, Scripted(values, **task), **guard)
    before_loss: list[int] = []
    run.context.task.before_loss = lambda: before_loss.append(1)  # type: ignore[attr-defined]
    run.run()
    assert rows(run, "val", "repaired", "accepted")[: len(expected)] == expected
    assert (run.at.good_round, run.at.rollbacks) == end
    repairs = sum(row["repaired"] for row in run.at.history)
    assert repairs == len([1 for _, repaired, _ in expected if repaired])
    trained = sum(trained for trained in _ntr_steps(run))
    assert len(before_loss) == trained + repairs * GUARD.repair_steps


def _ntr_steps(run: Runner) -> list[int]:
    """NTR steps of each round: a roll-back lets those of the next ones grow by half."""
    steps, found, breaches = METHOD.ntr_steps, [], 0
    for row in run.at.history:
        found.append(steps)
        breaches = 0 if row["accepted"] else breaches + 1
        if breaches > run.guard.config.patience:
            steps, breaches = min(math.ceil(1.5 * steps), GUARD.max_ntr_steps), 0
    return found


@pytest.mark.parametrize("values", [[50, 50, 40, 41, 49.2], [50, 40, 40]])
def test_a_roll_back_is_to_the_bit_and_forgets_what_led_away(values: list[float], tmp_path: Path) -> None:
    """To the last good state, the reference if there is none; attackers of a pool were displaced from what is gone."""
    states: list[dict[str, Tensor]] = [state_of(tiny_model())]
    remembered: list[int] = []

    def told(number: int) -> None:
        states.append(state_of(run.context.model))
        stage: Any = run.stage
        remembered.append(len(stage.fts.optimizer.state) + len(stage.ntr.optimizer.state) + len(stage.fts.pool.members))

    method = replace(METHOD, rounds=3, pool=2, chunk=1)
    run = runner(tmp_path, Scripted(values), told, method=method)
    run.run()
    gone = next(index for index, row in enumerate(run.at.history) if not row["accepted"])
    assert all(torch.equal(value, states[gone][name]) for name, value in states[gone + 1].items())
    assert remembered[gone] == 0
    assert all(remembered[index] for index in range(3) if index != gone)


@pytest.mark.parametrize(
    ("start", "growth", "cap", "grown"),
    [(2, 1.5, 8, [3, 5, 8, 8]), (2, 1.0, 8, [2, 2, 2, 2]), (1, 1.1, 3, [2, 3, 3, 3]), (6, 2.0, 4, [6, 6, 6, 6])],
)
def test_roll_backs_give_training_more_weight(
    start: int, growth: float, cap: int, grown: list[int], tmp_path: Path
) -> None:
    seen: list[int] = []
    run = runner(
        tmp_path, Scripted([50, 10, 10, 10, 10]), lambda number: seen.append(run.context.ntr_steps),
        method=replace(METHOD, ntr_steps=start), repair_steps=0, growth=growth, max_ntr_steps=cap,
    )  # fmt: skip
    with pytest.raises(GuardError):
        run.run()
    assert seen == grown


@pytest.mark.parametrize(
    ("guard", "task", "words"),
    [
        ({}, {}, r"within 1.0 of 50 \(round \d+ came nearest, with 10\); raise it, lower"),
        ({"patience": 100}, {}, r"within 1.0 of 50 \(round"),
        (PERCENT, LOWER, r"within 5.0 % of 50 \(round \d+ came nearest, with 100\); raise it"),
    ],
)
def test_nothing_acceptable(guard: dict[str, Any], task: dict[str, Any], words: str, tmp_path: Path) -> None:
    run = runner(tmp_path, Scripted([50, *[100.0 if task else 10.0] * 20], **task), **guard)
    for ask in (run.run, run.released, lambda: runner(tmp_path, Scripted(), **guard).released()):
        with pytest.raises(GuardError, match=rf"^guard.tolerance: no round kept score on val .*{words}") as caught:
            ask()
        assert "\n" not in str(caught.value)
    if not (task or guard):
        line = "guard: after round 1 score on val is 10, 40 worse than 50 (guard.tolerance=1); back to round 0, now "
        assert any(said.startswith(line) for said in run.tracker.said)  # type: ignore[attr-defined]


def test_a_tolerance_of_less_than_one_image_is_said(tmp_path: Path) -> None:
    images = len(ORIGINAL["val"])
    told = [
        runner(tmp_path / str(tolerance), tiny_task(), tolerance=tolerance).tracker.said
        for tolerance in (99 / images, 101 / images)
    ]
    assert [any(f"guard: one of the {images} images of val is" in line for line in said) for said in told] == [
        True,
        False,
    ]
