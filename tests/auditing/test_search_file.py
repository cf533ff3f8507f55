"""A search's file: interrupted, met by others, damaged."""

from __future__ import annotations

import errno
import itertools
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from sophon.attacker import FineTuneStrategy
from sophon.auditing.search import Report
from sophon.errors import UserError
from tests.auditing.searches import CONFIG, changed, evaluate, run

# several searches each
pytestmark = pytest.mark.slow


def test_a_search_interrupted_in_every_trial_is_the_search_uninterrupted(tmp_path, whole):
    path = tmp_path / "0" / "search.json"
    for number in range(CONFIG.trials):
        tried = itertools.count(number - (number > 0))

        def interrupted(strategy, report, number=number, tried=tried):
            if next(tried) < number:
                return evaluate(strategy, report)
            report(50, 1e9)  # what the median must not see
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(CONFIG, path, interrupted)
        path = Path(shutil.copytree(path.parent, tmp_path / str(number + 1))) / path.name  # and goes on elsewhere
    assert run(CONFIG, path) == whole


def test_a_finished_search_is_read_and_not_run(path, whole):
    assert run(CONFIG, path, lambda strategy, report: pytest.fail("a trial was run again")) == whole


def test_a_search_goes_on_when_it_is_given_more_trials(tmp_path, whole):
    path = tmp_path / "search.json"
    assert run(changed(trials=6, seeds=1), path) == whole[:6]
    assert run(CONFIG, path) == whole
    assert run(changed(trials=3), path) == whole[:3]


def test_an_error_in_a_trial_ends_the_search_and_leaves_it_untried(path, whole):
    def failing(strategy, report):
        raise UserError("out of data")

    with pytest.raises(UserError, match=r"^out of data$"):
        run(changed(trials=15), path, failing)
    assert [trial.number for trial in run(changed(trials=15), path)] == list(range(15))


def test_processes_that_meet_at_a_search_make_one_search_of_it(tmp_path, whole):
    path, evaluated = tmp_path / "search.json", []

    def counting(strategy: FineTuneStrategy, report: Report) -> float | None:
        evaluated.append(strategy)
        return evaluate(strategy, report)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: run(CONFIG, path, counting), range(3)))
    assert found == [whole] * 3
    assert len(evaluated) == CONFIG.trials
    assert [trial.number for trial in found[0]] == list(range(CONFIG.trials))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"higher": False}, "higher_is_better"),
        ({"config": changed(steps=99)}, "steps"),
        ({"config": changed(choices={})}, "choices"),
        ({"config": changed(optimizers={"adam": [1e-6, 1.0]})}, "optimizers"),
        ({"config": changed(sampler="random")}, "sampler"),
    ],
)
def test_the_file_of_another_search_is_refused(path, arguments, key):
    before = path.read_bytes()
    with pytest.raises(UserError) as caught:
        run(**{"config": CONFIG, "path": path, **arguments})
    line = f"{path} belongs to a search with another {key}; delete this file to search anew"
    assert str(caught.value) == line
    assert path.read_bytes() == before


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_bytes())
        change(content)
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("[]"),
        lambda path: path.write_bytes(path.read_bytes()[:-200]),
        lambda path: (path.unlink(), path.mkdir()),
        _edit(lambda content: content.pop("identity")),
        _edit(lambda content: content.pop("trials")),
        _edit(lambda content: content["trials"][3].update(state="BEGUN")),
        _edit(lambda content: content["trials"][3].update(params={}, distributions={})),
        _edit(lambda content: content["trials"][3]["params"].update(optimizer="muon")),
    ],
)
def test_a_file_that_is_no_search_is_named_in_one_line(path: Path, damage: Callable[[Path], object]) -> None:
    damage(path)
    with pytest.raises(UserError, match=rf"^cannot read {path}") as caught:
        run(CONFIG, path)
    assert "\n" not in str(caught.value)


def test_a_trial_that_cannot_be_written_is_told_of_in_one_line(path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"^cannot write .*search\.json: No space left on device$"):
        run(changed(trials=15), path)
