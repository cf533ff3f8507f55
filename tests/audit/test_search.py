from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, median
from typing import Any

import optuna
import pytest
import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from sophon import attacker
from sophon.attacker import FineTuneStrategy, Operation
from sophon.audit import search
from sophon.audit.search import Report, Trial, best, check, run_search, suggest
from sophon.config import SearchConfig
from sophon.errors import UserError

pytestmark = pytest.mark.slow  # a database for each search

NOISE = {"operation": "noise", "scale": 0.1}
CONFIG = SearchConfig(
    trials=14,
    steps=100,
    startup=4,
    optimizers={"adam": [1e-6, 1.0], "momentum": [1e-6, 10.0], "sgd": None},
    choices={
        "scope": ["all", "last_blocks", "lora"],
        "blocks": [1, 2],
        "surgery": [[], [NOISE]],
        "batch_size": [8, 64],
    },
)


def accuracy(strategy: FineTuneStrategy) -> float:
    """A smooth objective whose best is 100, at Adam's rate 1e-3 in batches of 64 on all layers."""
    good = {"adam": -3, "momentum": -1}[strategy.optimizer]
    penalty = 5 * (strategy.optimizer != "adam") + 5 * (strategy.scope != "all") + 5 * (strategy.batch_size != 64)
    return 100 - 15 * (math.log10(strategy.lr) - good) ** 2 - penalty


def evaluate(strategy: FineTuneStrategy, report: Report) -> float | None:
    """Climb to `accuracy` in three points; rates above 0.5 diverge after the first."""
    report(0, 10.0)
    report(50, accuracy(strategy) / 2)
    if strategy.lr > 0.5:
        return None
    report(100, accuracy(strategy))
    return accuracy(strategy)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What SQLite does against power cuts takes most of a search as short as these."""
    connect = sqlite3.connect

    def connect_without_sync(path):
        connection = connect(path)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    monkeypatch.setattr(search.sqlite3, "connect", connect_without_sync)


def run(config: SearchConfig, path: Path, evaluate=evaluate, seed: int = 0, higher: bool = True, **rest) -> list[Trial]:
    return run_search(config, storage=path, seed=seed, higher_is_better=higher, evaluate=evaluate, **rest)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[Trial]]:
    """The file and the trials of an uninterrupted search."""
    path = tmp_path_factory.mktemp("finished") / "search.db"
    return path, run(CONFIG, path)


@pytest.fixture
def path(finished, tmp_path) -> Path:
    """A copy of the file."""
    return Path(shutil.copy(finished[0], tmp_path))


@pytest.fixture
def whole(finished) -> list[Trial]:
    """The trials."""
    return finished[1]


def changed(**values: Any) -> SearchConfig:
    return dataclasses.replace(CONFIG, **values)


# the space


FIELDS: dict[str, list[Any]] = {
    "weight_decay": [0.0, 1e-4],
    "schedule": list(attacker.SCHEDULES),
    "batch_size": [1, 64],
    "scope": list(attacker.SCOPES),
    "head": list(attacker.HEADS),
    "probe_steps": [7, 70],
    "probe_lr": [0.125, 0.25],
    "augmentation": list(attacker.AUGMENTATIONS),
    "data_budget": [None, 100],
    "ema": [0.0, 0.99],
    "max_norm": [None, 1.0],
    "batch_norm": list(attacker.BATCH_NORMS),
    "blocks": [2, 3],
    "lora_rank": [1, 4],
    "lora_layers": ["linears", "convolutions"],
    "surgery": [[], [NOISE], [NOISE, {"operation": "heal", "steps": 3, "on": "original", "deep": True, "x": None}]],
}


@given(
    ranges=st.dictionaries(
        st.sampled_from(sorted(attacker.OPTIMIZERS)),
        st.tuples(st.floats(1e-9, 1e3), st.floats(1.0, 1e6)).map(lambda pair: [pair[0], pair[0] * pair[1]]),
        min_size=1,
    ),
    choices=st.fixed_dictionaries({}, optional={name: st.just(values) for name, values in FIELDS.items()}),
    seed=st.integers(0, 2**32 - 1),
)
def test_what_is_suggested_is_valid_and_of_the_space_and_comes_back_from_the_trial(ranges, choices, seed):
    config = SearchConfig(optimizers=ranges, choices=choices, steps=33)
    check("mine", config)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    trial = study.ask()
    strategy = suggest(config, trial)
    strategy.validate("strategy")
    assert strategy.steps == 33
    low, high = ranges[strategy.optimizer]
    assert low <= strategy.lr <= high
    plain = strategy.plain()
    for name in FIELDS:
        default = FineTuneStrategy().plain()[name]
        assert plain[name] in (choices[name] if name in trial.params else [default])
    assert suggest(config, study.tell(trial, 1.0)) == strategy


@pytest.mark.parametrize(
    ("field", "other", "values"),
    [
        ("blocks", "scope", {"first_blocks", "last_blocks"}),
        ("lora_rank", "scope", {"lora"}),
        ("lora_layers", "scope", {"lora"}),
        ("probe_steps", "head", {"probed"}),
        ("probe_lr", "head", {"probed"}),
    ],
)
def test_a_field_is_only_suggested_where_it_matters(field, other, values):
    for value in FIELDS[other]:
        trial = optuna.trial.FixedTrial({"optimizer": "adam", "lr.adam": 0.1, other: value, field: FIELDS[field][0]})
        config = SearchConfig(optimizers={"adam": [0.01, 1.0]}, choices={field: FIELDS[field], other: [value]})
        strategy = suggest(config, trial)
        assert (field in trial.distributions) == (value in values)
        assert getattr(strategy, field) == (FIELDS[field][0] if value in values else getattr(FineTuneStrategy(), field))


def test_a_field_whose_condition_is_not_a_choice_follows_the_default():
    trial = optuna.trial.FixedTrial({"optimizer": "adam", "lr.adam": 0.1})
    config = SearchConfig(optimizers={"adam": [0.1, 0.1]}, choices={"blocks": [3], "probe_steps": [9]})
    assert suggest(config, trial) == FineTuneStrategy(optimizer="adam", lr=0.1, steps=200)


def test_only_the_rate_of_the_drawn_optimizer_is_suggested_and_absent_ones_never():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = set()
    for _ in range(20):
        trial = study.ask()
        drawn.add(suggest(CONFIG, trial).optimizer)
        assert [name for name in trial.params if name.startswith("lr.")] == [f"lr.{trial.params['optimizer']}"]
    assert drawn == {"adam", "momentum"}


def test_surgery_becomes_operations():
    params = {"optimizer": "adam", "lr.adam": 0.1, "scope": "all", "batch_size": 8}
    trial = optuna.trial.FixedTrial({**params, "surgery": '[{"operation": "noise", "scale": 0.1}]'})
    assert suggest(CONFIG, trial).surgery == (Operation("noise", (("scale", 0.1),)),)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"colour": ["red"]}, r"attack\.search\.mine\.choices: 'colour' is not known; allowed: .*batch_size.*surgery"),
        ({"steps": [1]}, r"choices\.steps: not allowed here; give attack\.search\.mine\.steps"),
        ({"lr": [0.1]}, r"choices\.lr: not allowed here; give attack\.search\.mine\.optimizers"),
        ({"optimizer": ["sgd"]}, r"choices\.optimizer: not allowed here; give attack\.search\.mine\.optimizers"),
        ({"batch_size": []}, r"choices\.batch_size: \[\] is not allowed; give a list"),
        ({"batch_size": 8}, r"choices\.batch_size: 8 is not allowed; give a list"),
        ({"batch_size": [8, 0]}, r"choices\.batch_size\[1\]: 0 is not allowed; it must be a whole number >= 1"),
        ({"scope": ["all", "some"]}, r"choices\.scope\[1\]: 'some' is not known; allowed: all, attention"),
        ({"scope": [["all"]]}, r"choices\.scope\[0\]: .* is not known"),
        ({"ema": [1.0]}, r"choices\.ema\[0\]: 1\.0 is not allowed; it must be a number >= 0 and < 1"),
        ({"surgery": ["noise"]}, r"choices\.surgery\[0\]: noise is not allowed; give a list"),
        ({"surgery": [[], [{"scale": 1}]]}, r"choices\.surgery\[1\]\[0\]: .* names no operation"),
        ({"surgery": [[{**NOISE, "x": [1]}]]}, r"choices\.surgery\[0\]\[0\]\.x: \[1\] is not allowed"),
    ],
)
def test_choices_that_cannot_be_are_refused_in_one_line(choices, message):
    with pytest.raises(UserError, match=r"^attack\.search\.mine\.choices") as caught:
        check("mine", changed(choices=choices))
    assert caught.match(message)
    assert "\n" not in str(caught.value)


# the search


def test_trials_are_numbered_valid_and_told_of_as_they_end(tmp_path, capfd):
    told: list[Trial] = []
    trials = run(CONFIG, tmp_path / "search.db", on_trial=told.append)
    assert told == trials
    assert [trial.number for trial in trials] == list(range(14))
    assert {trial.state for trial in trials} == {"complete", "pruned", "failed"}
    for trial in trials:
        trial.strategy.validate("trial")
        assert trial.strategy.steps == 100
        if trial.state == "complete":
            assert (trial.value, trial.step) == (accuracy(trial.strategy), 100)
        elif trial.state == "pruned":
            assert (trial.value, trial.step) == (accuracy(trial.strategy) / 2, 50)
        else:
            assert trial.strategy.lr > 0.5
            assert (trial.value, trial.step) == (None, 50)
    assert capfd.readouterr() == ("", "")


def test_seeds_differ(tmp_path, whole):
    assert [t.strategy for t in run(changed(trials=2), tmp_path / "b.db", seed=1)] != [t.strategy for t in whole[:2]]


def test_logging_is_as_verbose_afterwards_as_before(tmp_path):
    before = optuna.logging.get_verbosity()
    with pytest.raises(ZeroDivisionError):
        run(CONFIG, tmp_path / "search.db", lambda strategy, report: 1 / 0)
    assert optuna.logging.get_verbosity() == before == logging.INFO


def test_tpe_finds_better_ones_than_chance_does(tmp_path):
    late: dict[str, list[float]] = {"tpe": [], "random": []}
    for sampler, seed in itertools.product(late, range(4)):
        config = changed(sampler=sampler, trials=24, startup=8, prune=False)
        trials = run(config, tmp_path / f"{sampler}{seed}.db", lambda strategy, report: accuracy(strategy), seed=seed)
        late[sampler].append(median(accuracy(trial.strategy) for trial in trials[-8:]))
    assert all(tpe > chance for tpe, chance in zip(late["tpe"], late["random"], strict=True))
    assert mean(late["tpe"]) > mean(late["random"]) + 20


def test_lower_is_better_where_it_is_said(tmp_path, whole):
    def mirrored(strategy, report):
        value = evaluate(strategy, lambda step, value: report(step, -value))
        return None if value is None else -value

    trials = run(CONFIG, tmp_path / "search.db", mirrored, higher=False)
    assert [(t.strategy, t.state, t.step) for t in trials] == [(t.strategy, t.state, t.step) for t in whole]
    assert [trial.value for trial in trials] == [None if trial.value is None else -trial.value for trial in whole]
    winner, same = best(trials, False), best(whole, True)
    assert winner is not None
    assert same is not None
    assert winner.number == same.number


# pruning


def scripted(curves: list[list[tuple[int, float]]]):
    """Follow given curves, one a trial, and end with the last value of each."""
    left = iter(curves)

    def follow(strategy, report):
        curve = next(left)
        for step, value in curve:
            report(step, value)
        return curve[-1][1]

    return follow


def states(config: SearchConfig, path: Path, curves: list[list[tuple[int, float]]], higher: bool = True) -> list[str]:
    trials = run(dataclasses.replace(config, trials=len(curves)), path, scripted(curves), higher=higher)
    return [trial.state for trial in trials]


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_the_worse_half_is_stopped_after_the_startup(tmp_path, higher, sign):
    curves = [[(50, sign * value), (100, sign * 2 * value)] for value in (1.0, 2.0, 3.0, 4.0, 2.4, 2.6)]
    expected = ["complete"] * 4 + ["pruned", "complete"]
    assert states(changed(prune=True), tmp_path / "search.db", curves, higher) == expected


def test_nothing_is_stopped_unless_asked_for(tmp_path):
    curves = [[(50, float(value)), (100, float(value))] for value in range(6, 0, -1)]
    assert states(changed(prune=False), tmp_path / "search.db", curves) == ["complete"] * 6


def test_neither_the_start_nor_the_end_stops_a_trial(tmp_path):
    curves = [[(0, float(value)), (100, float(value))] for value in range(6, 0, -1)]
    assert states(changed(startup=1), tmp_path / "search.db", curves) == ["complete"] * 6


def test_what_it_began_with_does_not_save_a_trial(tmp_path):
    curves = [[(0, 10.0), (50, value), (100, value)] for value in (5.0, 6.0, 4.0)]
    assert states(changed(startup=2), tmp_path / "search.db", curves)[2] == "pruned"


def test_a_diverged_trial_counts_in_the_median_but_not_as_a_result(tmp_path):
    curves = [[(50, 9.0), (100, math.nan)], [(50, 1.0), (100, 1.0)], [(50, 4.0), (100, 4.0)], [(50, 6.0), (100, 6.0)]]
    assert states(changed(startup=2), tmp_path / "search.db", curves) == ["failed", "complete", "pruned", "complete"]


# divergence


@pytest.mark.parametrize("value", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("higher", [True, False])
def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(tmp_path, value, higher):
    def diverging(strategy, report):
        report(50, math.nan)
        return value

    trials = run(changed(trials=6), tmp_path / "search.db", diverging, higher=higher)
    assert [(trial.state, trial.value, trial.step) for trial in trials] == [("failed", None, 0)] * 6
    assert best(trials, higher) is None


def test_tpe_keeps_away_from_where_trials_diverge(tmp_path):
    def flat(strategy, report):  # so that only divergence can teach anything
        return 50.0 if strategy.lr < 1e-5 else None

    config = changed(trials=24, startup=10, optimizers={"adam": [1e-6, 1.0]}, choices={})
    searches = [run(config, tmp_path / f"{seed}.db", flat, seed=seed) for seed in range(3)]
    failed = [[trial.state == "failed" for trial in trials] for trials in searches]
    assert mean(itertools.chain(*(each[:10] for each in failed))) >= 0.7
    assert mean(itertools.chain(*(each[10:] for each in failed))) <= 0.5


# interruption


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


_CHILD = """
    import os, signal, sys
    from pathlib import Path
    import sqlalchemy
    from tests.audit import test_search as here

    path, moment = Path(sys.argv[1]), sys.argv[2]

    def evaluate(strategy, report):
        evaluate.calls += 1
        value = here.evaluate(strategy, report)
        if moment == "evaluate" and evaluate.calls == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    @sqlalchemy.event.listens_for(sqlalchemy.Engine, "after_cursor_execute")
    def executed(connection, cursor, statement, *rest):
        if evaluate.calls == 6 and statement.startswith(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    evaluate.calls = 0
    here.run(here.CONFIG, path, evaluate)
"""


@pytest.mark.parametrize("moment", ["evaluate", "INSERT INTO trial_intermediate_values"])
def test_a_process_killed_is_as_if_it_had_not_been(tmp_path, whole, moment):
    path = tmp_path / "search.db"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(_CHILD), str(path), moment]
    root = Path(__file__).parents[2]
    child = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert (child.returncode, child.stderr) == (-signal.SIGKILL, "")
    assert run(changed(trials=5), path, lambda strategy, report: pytest.fail("a trial was lost")) == whole[:5]
    assert run(CONFIG, path) == whole


# the file


def numbers(path: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        return [row[0] for row in connection.execute("SELECT number FROM trials ORDER BY trial_id")]


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


def _nothing(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("trials: none\n" * 100)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _other_database(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    connection.close()


def _other_study(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE studies SET study_name = 'mine'")
    connection.close()


def _without_identity(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM study_user_attributes")
    connection.close()


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20000])


def _without_parameters(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("DELETE FROM trial_params")
    connection.close()


def _other_schema(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99'")
    connection.close()


@pytest.mark.parametrize(
    "damage",
    [
        _nothing,
        _text,
        _other_database,
        _other_study,
        _without_identity,
        _truncated,
        _without_parameters,
        _other_schema,
        _folder,
    ],
)
def test_a_file_that_is_no_search_is_named_in_one_line(path, damage):
    damage(path)
    with pytest.raises(UserError) as caught:
        run(CONFIG, path)
    message = str(caught.value)
    assert message.startswith(f"cannot read {path} as a search: ")
    assert message.endswith("; delete this file to search anew")
    assert "\n" not in message


def test_a_folder_that_cannot_be_made_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "search.db"
    with pytest.raises(UserError, match=r"^cannot write .*file/search\.db: File exists$") as caught:
        run(CONFIG, path)
    assert "\n" not in str(caught.value)


def test_a_trial_that_cannot_be_written_is_told_of_in_one_line(path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)

    def sabotage(strategy, report):
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE trials")
        connection.close()
        return 1.0

    with pytest.raises(UserError, match=r"^cannot write .*search\.db: no such table: trials$"):
        run(changed(trials=15), path, sabotage)


# what comes of it


def trial(number: int, value: float | None, state: str = "complete") -> Trial:
    return Trial(number, FineTuneStrategy(), value, state, 1)


def test_the_best_is_the_earliest_of_the_best_complete_ones():
    trials = [trial(0, None, "failed"), trial(1, 2.0), trial(2, 9.0, "pruned"), trial(3, 5.0), trial(4, 5.0)]
    trials += [trial(5, 2.0), trial(6, 0.0)]
    assert best(trials, True) == trials[3]
    assert best(trials, False) == trials[6]
    assert best(trials[:6], False) == trials[1]


def test_without_a_complete_trial_there_is_no_best():
    assert best([], True) is None
    assert best([trial(0, 9.0, "pruned")], True) is None
