"""Progress where it is asked for, silence where it is not, and wandb behind a stand-in of its own."""

from __future__ import annotations

import io
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sophon import tracking
from sophon.errors import UserError
from sophon.tracking import Tracker


class Run:
    def __init__(self) -> None:
        self.logged: list[tuple[dict[str, float], int]] = []
        self.finished = 0

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((values, step))

    def finish(self, exit_code: int | None = None) -> None:  # wandb's own signature
        self.finished += 1


class WandbError(Exception):
    pass


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for wandb: remembers what it was started with, and fails if told to."""
    module: Any = types.ModuleType("wandb")
    module.errors = types.SimpleNamespace(Error=WandbError)
    module.Settings = lambda **settings: settings
    module.started, module.run, module.failure = [], Run(), None

    def init(**arguments: Any) -> Run:
        module.started.append(arguments)
        if module.failure is not None:
            raise module.failure
        return module.run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_disabled_is_silent_and_starts_nothing(wandb: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tracker = Tracker(run_dir=tmp_path)
    tracker.log({"loss": 1.0}, 1)
    tracker.say("hello")
    with tracker.progress("protect", 2) as advance:
        advance()
        advance("note", steps=1)
    tracker.close()
    assert capsys.readouterr() == ("", "")
    assert not wandb.started
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_wandb_gets_the_run(mode: str, wandb: Any, tmp_path: Path) -> None:
    config = {"seed": 3}
    tracker = Tracker(mode, run_dir=tmp_path, project="p", name="n", config=config)
    (started,) = wandb.started
    settings = started.pop("settings")
    assert started == {"project": "p", "name": "n", "dir": tmp_path, "mode": mode, "config": config}
    assert settings == {"silent": True, "console": "off"}
    tracker.log({"loss": 0.5}, 7)
    assert wandb.run.logged == [({"loss": 0.5}, 7)]
    tracker.close()
    tracker.close()
    tracker.log({"loss": 0.4}, 8)
    assert wandb.run.finished == 1
    assert len(wandb.run.logged) == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (WandbError("no API key\nrun wandb login"), "no API key"),
        (WandbError(), "WandbError"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_refusal_is_one_line(failure: Exception, reason: str, wandb: Any) -> None:
    wandb.failure = failure
    with pytest.raises(UserError, match=r"^tracking.wandb: 'online' failed \(") as caught:
        Tracker("online")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A line every 15 s and one at the end; the time left counts from where a resumed run began."""
    clock = [100.0]
    monkeypatch.setattr(tracking.time, "monotonic", lambda: clock[0])
    tracker = Tracker(progress=True)
    tracker.say("round [1] begins")
    with tracker.progress("protect", 10, done=4) as advance:
        clock[0] += 15
        advance("attacker 1", 0)
        for seconds in (1, 9, 6, 1, 1):
            clock[0] += seconds
            advance("loss 0.5")
        clock[0] += 1
        advance()
    assert capsys.readouterr().err.splitlines() == [
        "round [1] begins",
        "protect 4/10, 15 s attacker 1",
        "protect 7/10, 31 s, ETA 31 s loss 0.5",  # 3 steps took 31 s, 3 are left
        "protect 10/10, 34 s, ETA 0 s",
    ]


def test_bar_on_a_terminal() -> None:
    tracker, screen = Tracker(progress=True), io.StringIO()
    tracker._console = Console(file=screen, force_terminal=True, width=80)
    with tracker.progress("protect", 4, done=1) as advance:
        advance("loss 0.5" + 80 * "x", steps=3)
        tracker.say("guard: [back]")
    shown = screen.getvalue()
    assert "4/4" in shown
    assert "loss 0.5" in shown
    assert "guard: [back]" in shown
    assert re.search(r"ETA \S*0:00:00\S* loss 0.5x+…", shown)


@pytest.mark.slow
def test_wandb_offline_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = Tracker("offline", run_dir=tmp_path, name="n", config={"seed": 1})
    tracker.log({"loss": 0.5}, 1)
    tracker.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_nothing_left_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker(progress=True).progress("audit", 3, done=3):
        pass
    assert capsys.readouterr().err == ""
