"""A search's file: interrupted, met by others, damaged."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import optuna
import pytest
import sqlalchemy

from sophon.attacker import FineTuneStrategy
from sophon.auditing import search
from sophon.auditing.search import Report
from sophon.errors import UserError
from tests.auditing.searches import CONFIG, changed, evaluate, run

# a database for each search
pytestmark = pytest.mark.slow


class Killed(BaseException):
    """Not to be caught by anything that a kill would not be caught by."""


def test_a_search_interrupted_in_every_trial_is_the_search_uninterrupted(tmp_path, whole):
    path = tmp_path / "0" / "search.db"
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
    path = tmp_path / "search.db"
    assert run(changed(trials=6, seeds=1), path) == whole[:6]
    assert run(CONFIG, path) == whole
    assert run(changed(trials=3), path) == whole[:3]


def test_an_error_in_a_trial_ends_the_search_and_leaves_it_untried(path, whole):
    def failing(strategy, report):
        raise UserError("out of data")

    with pytest.raises(UserError, match=r"^out of data$"):
        run(changed(trials=15), path, failing)
    assert [trial.number for trial in run(changed(trials=15), path)] == list(range(15))


@pytest.mark.parametrize(
    "statement", ["CREATE TABLE trials", "INSERT INTO alembic", "INSERT INTO studies", "INSERT INTO study_user"]
)
def test_a_file_is_made_whole_or_not_at_all(tmp_path, whole, statement):
    path = tmp_path / "search.db"
    with _killed_at(statement), pytest.raises(Killed):
        run(CONFIG, path)
    assert list(tmp_path.iterdir()) == []
    assert run(changed(trials=2), path) == whole[:2]


@pytest.mark.parametrize("statement", ["INSERT INTO trials", "INSERT INTO trial_params", "UPDATE trials"])
def test_a_trial_is_written_whole_or_not_at_all(path, whole, statement):
    with _killed_at(statement), pytest.raises(Killed):
        run(changed(trials=16), path)
    assert run(CONFIG, path, lambda strategy, report: pytest.fail("a trial was lost")) == whole
    assert len(run(changed(trials=15), path)) == 15


@contextlib.contextmanager
def _killed_at(beginning: str) -> Iterator[None]:
    """Raise `Killed` once SQLite has executed a statement that begins so."""

    def executed(connection, cursor, statement, *rest):
        if statement.strip().startswith(beginning):
            raise Killed

    sqlalchemy.event.listen(sqlalchemy.Engine, "after_cursor_execute", executed)
    try:
        yield
    finally:
        sqlalchemy.event.remove(sqlalchemy.Engine, "after_cursor_execute", executed)


def _execute(path: Path, statement: str) -> list[tuple]:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        return connection.execute(statement).fetchall()


def numbers(path: Path) -> list[int]:
    return [row[0] for row in _execute(path, "SELECT number FROM trials ORDER BY trial_id")]


def test_processes_that_meet_at_a_search_make_one_search_of_it(tmp_path, whole):
    path, evaluated = tmp_path / "search.db", []

    def counting(strategy: FineTuneStrategy, report: Report) -> float | None:
        evaluated.append(strategy)
        return evaluate(strategy, report)

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: run(CONFIG, path, counting), range(3)))
    assert found == [whole] * 3
    assert len(evaluated) == CONFIG.trials
    assert numbers(path) == list(range(CONFIG.trials))


def test_where_there_are_no_locks_a_trial_drawn_from_other_trials_is_not_written(tmp_path, whole, monkeypatch):
    path = tmp_path / "search.db"
    monkeypatch.setattr(search, "lock", lambda path, wait: contextlib.nullcontext())

    def meeting(strategy: FineTuneStrategy, report: Report) -> float | None:
        if len(numbers(path)) == 5:  # while this is the sixth trial of one process, another writes one
            run(dataclasses.replace(CONFIG, trials=6), path)
        return evaluate(strategy, report)

    with pytest.raises(UserError, match=r"^another process writes .*; end one of the two"):
        run(CONFIG, path, meeting)
    assert numbers(path) == list(range(6))
    assert run(CONFIG, path) == whole


def test_any_name_will_do_and_nothing_holds_or_surrounds_the_file(tmp_path, whole):
    path = tmp_path / "a folder {x}?&" / "50% #1.db"
    assert run(changed(trials=2), path) == whole[:2]
    assert list(path.parent.iterdir()) == [path]
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{path.rename(tmp_path / 'plain.db')}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE" if t.value else "FAIL" for t in whole[:2]]


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


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("trials: none\n" * 100),
        lambda path: path.write_bytes(path.read_bytes()[:-20000]),
        _folder,
        "DROP TABLE studies",
        "UPDATE studies SET study_name = 'mine'",
        "DELETE FROM study_user_attributes",
        "DELETE FROM trial_params",
        "UPDATE alembic_version SET version_num = 'v99'",
        "UPDATE trials SET number = 2 WHERE number = 3",
    ],
)
def test_a_file_that_is_no_search_is_named_in_one_line(path: Path, damage: Callable[[Path], object] | str) -> None:
    _execute(path, damage) if isinstance(damage, str) else damage(path)
    with pytest.raises(UserError) as caught:
        run(CONFIG, path)
    message = str(caught.value)
    assert message.startswith(f"cannot read {path} as a search: ")
    assert message.endswith("; delete this file to search anew")
    assert "\n" not in message


def test_a_trial_that_cannot_be_written_is_told_of_in_one_line(path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def sabotage(strategy, report):
        _execute(path, "CREATE TRIGGER full BEFORE INSERT ON trials BEGIN SELECT RAISE(ABORT, 'disk full'); END")
        return 1.0

    with pytest.raises(UserError, match=r"^cannot write .*search\.db: disk full$"):
        run(changed(trials=15), path, sabotage)
