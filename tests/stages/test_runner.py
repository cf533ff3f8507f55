"""The runner: its state file, its interruptions, several stages in a row, and a user's own."""

from __future__ import annotations

import itertools
import math
import re
import signal
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sophon.errors import GuardError, UserError
from sophon.protection.context import Context
from sophon.protection.resume import STATE_FILE
from sophon.protection.stage import Row, Stage
from tests.protection.staged import METHOD, Scripted, rows, runner
from tests.tiny import assert_same_state, state_of, tiny_model


class Mute(Stage):
    """Forgets to say what a round came to."""

    def step(self, context: Context, number: int) -> Row:
        return None  # type: ignore[return-value]


class Shrink(Stage):
    """Shrinks the head a little in each round."""

    @dataclass
    class Config:
        keep: float = 0.9

    def step(self, context: Context, number: int) -> Row:
        with torch.no_grad():
            context.model.get_parameter("fc.weight").mul_(self.config.keep)
        return {}


SHRINK = {"stage": "tests.stages.test_runner.Shrink", "keep": 0.5, "rounds": 2}
SEVERAL = replace(METHOD, stages={"shrink": SHRINK, "alternate": {}, "again": SHRINK | {"rounds": 3}})


def test_stages_follow_each_other_under_one_guard(tmp_path: Path) -> None:
    run = runner(tmp_path, Scripted(), method=SEVERAL)
    ends: dict[int, Any] = {}
    run.tracker.told = lambda number: ends.update({number: state_of(run.context.model)})  # type: ignore[attr-defined]
    released = run.run()
    assert rows(run, "round", "stage") == [
        (r, s) for r, s in enumerate(["shrink"] * 2 + ["alternate"] * 4 + ["again"] * 3, 1)
    ]
    assert (run.at.round, run.at.good_round, run.at.stage) == (9, 9, 2)
    head = tiny_model().get_parameter("fc.weight")
    assert torch.equal(ends[2]["fc.weight"], 0.25 * head)
    assert torch.equal(released.get_parameter("fc.weight"), 0.125 * ends[6]["fc.weight"])
    assert not torch.equal(ends[6]["fc.weight"], ends[2]["fc.weight"])
    assert_same_state(released, ends[9])


def test_a_stage_that_the_guard_never_accepts_ends_the_run(tmp_path: Path) -> None:
    """What the stage before has released can still be had."""
    run = runner(tmp_path, Scripted([50, 50, 50, *[10] * 30]), method=SEVERAL, repair_steps=0)
    with pytest.raises(GuardError, match=r"^guard.tolerance: no round kept"):
        run.run()
    expected = 0.25 * tiny_model().get_parameter("fc.weight")
    for one in (run, runner(tmp_path, Scripted(), method=SEVERAL)):
        assert torch.equal(one.released().get_parameter("fc.weight"), expected)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"unknown": {}}, r"^method\.stages\.unknown: 'unknown' is not known; .*alternate.*reparameterise"),
        ({"mine": {"stage": "json.dumps"}}, r"^method\.stages\.mine: 'json\.dumps' is not allowed; .*subclass of"),
        ({"mine": {"stage": "no.such.Stage"}}, r"^method\.stages\.mine: 'no\.such\.Stage' cannot be imported"),
        ({"alternate": {"gains": [1.0]}}, r"^method\.stages\.alternate\.gains: 'alternate' has no such argument"),
        ({"mine": SHRINK | {"keep": "a"}}, r"^method\.stages\.mine\.keep: a is not allowed; .* a finite number"),
        ({"alternate": 3}, r"^method\.stages\.alternate: 3 is not allowed; give a mapping"),
        (
            {"alternate": {"rounds": 0}},
            r"^method\.stages\.alternate\.rounds: 0 is not allowed; give a whole number >= 1",
        ),
        ({"reparameterise": {"gains": [0]}}, r"^method\.stages\.reparameterise\.gains\[0\]: 0 is not allowed; .* > 0"),
    ],
)
def test_stages_that_are_refused(stages: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        runner(tmp_path, method=replace(METHOD, stages=stages))
    assert "\n" not in str(caught.value)


def test_a_round_that_says_nothing_is_refused(tmp_path: Path) -> None:
    run = runner(tmp_path, method=replace(METHOD, stages={"mute": {"stage": "tests.stages.test_runner.Mute"}}))
    with pytest.raises(
        UserError, match=r"^method\.stages\.mute: step of tests\.\S+\.Mute returned None; it must return a"
    ):
        run.run()


def test_a_long_round_shows_where_it_is_and_how_long_all_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sophon.protection.runner._QUIET", -1.0)
    monkeypatch.setattr("sophon.protection.runner._LONG", -1.0)
    shown: list[str] = []
    run = runner(tmp_path)
    monkeypatch.setattr(run.tracker, "progress", lambda *_: nullcontext(lambda note, steps=1: shown.append(note)))
    run.run()
    assert re.fullmatch(r"round 1: attacker 1 of 2, step 1 of [123]", shown[0])
    assert "round 1: NTR step 2 of 2" in shown
    [said] = [line for line in run.tracker.said if "the 3 that are left take about" in line]  # type: ignore[attr-defined]
    assert "method=pool_anchored" in said
    assert "run_dir=DIR" in said


# --- the state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_state_is_refused(kept: float, tmp_path: Path) -> None:
    runner(tmp_path, method=replace(METHOD, rounds=1)).run()
    path = tmp_path / STATE_FILE
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match=f"{STATE_FILE}: it is truncated"):
        runner(tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_last_look(tmp_path: Path) -> None:
    def spoil(number: int) -> None:
        if number == 2:
            with torch.no_grad():
                run.context.model.get_parameter("fc.bias")[0] = math.nan

    run = runner(tmp_path, told=spoil)
    with pytest.raises(UserError, match=r"method.ntr_lr"):
        run.run()
    again = runner(tmp_path)
    assert again.at.round == 2
    assert all(value.isfinite().all() for value in again.released().state_dict().values())


# --- interruptions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_round_and_saves(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sent in the middle of the second round's training; no look is due then."""
    task, calls = Scripted(), itertools.count(1)

    def before_loss() -> None:
        if next(calls) == METHOD.ntr_steps + 1:
            signal.raise_signal(number)

    task.before_loss = before_loss
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = runner(tmp_path, task, every=4)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "this round is finished and saved first" in capsys.readouterr().err
    assert [row["round"] for row in run.at.history] == [1, 2]
    assert next(calls) == 2 * METHOD.ntr_steps + 1
    assert runner(tmp_path, Scripted(), every=4).at == run.at


def test_a_second_signal_interrupts_at_once(tmp_path: Path) -> None:
    task = Scripted()
    task.before_loss = lambda: signal.raise_signal(signal.SIGINT)
    run = runner(tmp_path, task)
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert run.at.round == 0
    assert not (tmp_path / STATE_FILE).exists()


@pytest.mark.slow
def test_runs_outside_the_main_thread_and_under_a_profile(tmp_path: Path) -> None:
    run, ended = runner(tmp_path), []
    run.profile = True
    thread = threading.Thread(target=lambda: ended.append(run.run()))
    thread.start()
    thread.join()
    assert len(ended) == 1
    assert {path.name for path in tmp_path.iterdir()} == {STATE_FILE, "profile.txt", "profile.json.gz"}


def test_a_signal_in_the_last_round_just_ends_the_run(tmp_path: Path) -> None:
    run = runner(tmp_path, told=lambda number: number == 4 and signal.raise_signal(signal.SIGINT))
    assert run.run() is not None
