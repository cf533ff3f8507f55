"""The attacker who searches: its space, its trials, and what comes of them."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from pathlib import Path
from statistics import mean
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon import attacker
from sophon.attacker import FineTuneStrategy, Operation
from sophon.auditing.search import Trial, best, check, suggest
from sophon.config import SearchConfig
from sophon.errors import UserError
from tests.auditing.searches import CONFIG, NOISE, accuracy, changed, evaluate, run

# a database for each search
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_waiting_for_the_disk")]


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
    "lora_recipe": list(attacker.LORA_RECIPES),
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
        ("lora_recipe", "scope", {"lora"}),
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
