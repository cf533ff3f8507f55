"""What is said of an audit before it starts."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sophon.auditing import forecast as module
from sophon.auditing.forecast import forecast, lasting
from tests.auditing.staging import BENIGN, CONFIG, SEARCHING, staged
from tests.tiny import assert_same_state, state_of


def test_attacks_are_counted_and_nothing_is_left_behind(tmp_path: Path) -> None:
    runner = staged(tmp_path, replace(CONFIG, search=SEARCHING.search, benign=["kept"]), benign=BENIGN)
    before, state = state_of(runner.scene.models["protected"]), torch.get_rng_state()
    everything = "3 attacks and 1 searching attacker of 4 trials against 3 models: 36 attempts"
    estimate = r"; estimated \d+ s in 2 workers, masking and intactness not counted"
    assert re.fullmatch(everything + estimate, forecast(runner, list(runner.jobs), 2))
    [*_, last] = runner.jobs
    assert re.fullmatch(
        f"{everything}, 1 of them to run; estimated 1 s in 1 worker, masking and intactness not counted",
        forecast(runner, [last], 2),
    )
    assert forecast(runner, [], 2) == f"{everything}, 0 of them to run"
    assert_same_state(runner.scene.models["protected"], before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(tmp_path.iterdir())


def test_the_time_is_that_of_steps_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_seconds", lambda scene: (1.0, 1000.0))  # an image, an evaluation
    runner = staged(tmp_path)
    images = 3 * 2 * 8 * (4 + 6)  # models, seeds, batch, steps
    evaluations = 3 * 2 * 2 * (3 + 1)  # models, seeds, attacks, points of select and, as large, test
    assert forecast(runner, list(runner.jobs), 1).endswith(
        f"{(images + 1000 * evaluations) / 3600:.1f} h in 1 worker, masking and intactness not counted"
    )
    runner = staged(tmp_path, SEARCHING)
    seconds = (4 + 2) * 3 * 8 + 1000 * (4 * 3 + 2 * (2 + 1))
    assert forecast(runner, list(runner.jobs), 1).endswith(
        f"{seconds / 3600:.1f} h in 1 worker, masking and intactness not counted"
    )


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.1, "1 s"), (40.4, "40 s"), (89.0, "89 s"), (3000.0, "50 min"), (16200.0, "4.5 h")]
)
def test_times_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert lasting(seconds) == words
