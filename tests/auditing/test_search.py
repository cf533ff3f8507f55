"""The attacker who searches: its space, its trials, and what comes of them."""

from __future__ import annotations

import logging
import math
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophon import attacker
from sophon.attacker import FineTuneStrategy
from sophon.auditing.search import Trial, best, check, suggest
from sophon.config import SearchConfig
from sophon.errors import UserError
from tests.auditing.searches import CONFIG, NOISE, accuracy, changed, evaluate, run

# many trials each
pytestmark = pytest.mark.slow


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


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"colour": ["red"]}, r"attack\.search\.mine\.choices: 'colour' is not known; allowed: .*batch_size.*surgery"),
        ({"steps": [1]}, r"choices\.steps: not allowed here; give attack\.search\.mine\.steps"),
        ({"lr": [0.1]}, r"choices\.lr: not allowed here; give attack\.search\.mine\.optimizers"),
        ({"optimizer": ["sgd"]}, r"choices\.optimizer: not allowed here; give attack\.search\.mine\.optimizers"),
        ({"batch_size": []}, r"choices\.batch_size: \[\] is not allowed; give a list"),
        ({"batch_size": 8}, r"choices\.batch_size: 8 is not allowed; give a list"),
        ({"batch_size": [8, 0]}, r"choices\.batch_size\[1\]: 0 is not allowed; give a whole number >= 1"),
        ({"scope": ["all", "some"]}, r"choices\.scope\[1\]: 'some' is not known; allowed: all, attention"),
        ({"scope": [["all"]]}, r"choices\.scope\[0\]: .* is not known"),
        ({"ema": [1.0]}, r"choices\.ema\[0\]: 1\.0 is not allowed; give a finite number >= 0 and < 1"),
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
    trials = run(CONFIG, tmp_path / "search.json", on_trial=told.append)
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


def test_logging_is_as_verbose_afterwards_as_before(tmp_path):
    before = optuna.logging.get_verbosity()
    with pytest.raises(ZeroDivisionError):
        run(CONFIG, tmp_path / "search.json", lambda strategy, report: 1 / 0)
    assert optuna.logging.get_verbosity() == before == logging.INFO


def test_lower_is_better_where_it_is_said(tmp_path, whole):
    def mirrored(strategy, report):
        value = evaluate(strategy, lambda step, value: report(step, -value))
        return None if value is None else -value

    trials = run(CONFIG, tmp_path / "search.json", mirrored, higher=False)
    assert [(t.strategy, t.state, t.step) for t in trials] == [(t.strategy, t.state, t.step) for t in whole]
    assert [trial.value for trial in trials] == [None if trial.value is None else -trial.value for trial in whole]
    winner, same = best(trials, False), best(whole, True)
    assert winner is not None
    assert same is not None
    assert winner.number == same.number


COMPLETE = ["complete"]
FALLING = [[(0, value), (100, value)] for value in range(6, 0, -1)]


@pytest.mark.parametrize(
    ("changes", "curves", "expected"),
    [
        (
            {},
            [[(50, value), (100, 2 * value)] for value in (1, 2, 3, 4, 2.4, 2.6)],
            [*COMPLETE * 4, "pruned", *COMPLETE],
        ),
        ({"prune": False}, [[(50, value), (100, value)] for value in range(6, 0, -1)], COMPLETE * 6),
        # neither the start nor the end stops a trial
        ({"startup": 1}, FALLING, COMPLETE * 6),
        # what it began with does not save one
        ({"startup": 2}, [[(0, 10), (50, value), (100, value)] for value in (5, 6, 4)], [*COMPLETE * 2, "pruned"]),
        # one that diverged counts in the median, but not as a result
        (
            {"startup": 2},
            [[(50, 9), (100, math.nan)], *([(50, value), (100, value)] for value in (1, 4, 6))],
            ["failed", *COMPLETE, "pruned", *COMPLETE],
        ),
    ],
    ids=["worse half", "not asked for", "ends", "beginning", "diverged"],
)
def test_the_worse_half_is_stopped_after_the_startup(tmp_path, changes, curves, expected):
    left = iter(curves)

    def follow(strategy, report):
        curve = next(left)
        for step, value in curve:
            report(step, float(value))
        return float(curve[-1][1])

    trials = run(changed(trials=len(curves), **changes), tmp_path / "search.json", follow)
    assert [trial.state for trial in trials] == expected


@pytest.mark.parametrize(("value", "higher"), [(None, True), (math.nan, True), (math.inf, True), (-math.inf, False)])
def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(tmp_path, value, higher):
    def diverging(strategy, report):
        report(50, math.nan)
        return value

    trials = run(changed(trials=6), tmp_path / "search.json", diverging, higher=higher)
    assert [(trial.state, trial.value, trial.step) for trial in trials] == [("failed", None, 0)] * 6
    assert best(trials, higher) is None


def trial(number: int, value: float | None, state: str = "complete") -> Trial:
    return Trial(number, FineTuneStrategy(), value, state, 1)


def test_the_best_is_the_earliest_of_the_best_complete_ones():
    trials = [trial(0, None, "failed"), trial(1, 2.0), trial(2, 9.0, "pruned"), trial(3, 5.0), trial(4, 5.0)]
    trials += [trial(5, 2.0), trial(6, 0.0)]
    assert best(trials, True) == trials[3]
    assert best(trials, False) == trials[6]
    assert best(trials[:6], False) == trials[1]
    assert best([], True) is best([trial(0, 9.0, "pruned")], True) is None
