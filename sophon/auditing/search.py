"""The attacker who searches: optuna proposes strategies from the space of a `SearchConfig` and learns from the results.

A search that was killed and started again ends with the trials of one that never was: its file holds finished trials
only, and the seed, its number and the trials before it decide a trial. One process at a time works on a file; another
one waits, and goes on from what it finds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from sophon.attacker import OF_SCOPE, FineTuneStrategy, check_field, operations_from
from sophon.config import SearchConfig
from sophon.errors import UserError, choose, one_line
from sophon.files import read_json, write_json
from sophon.locks import lock
from sophon.paths import exists, explained
from sophon.seeds import derive_seed

Report = Callable[[int, float], None]
Evaluate = Callable[[FineTuneStrategy, Report], float | None]

_GIVEN = ("optimizer", "optimizer_args", "lr", "steps")  # by the search itself, or by the optimizer's name
_FIELDS = [part.name for part in dataclasses.fields(FineTuneStrategy) if part.name not in _GIVEN]
# These matter only beside certain values of another field; elsewhere they would be noise to the sampler.
_CONDITIONS = {
    **{field: ("scope", scopes) for field, scopes in OF_SCOPE.items()},
    "probe_steps": ("head", ("probed",)),
    "probe_lr": ("head", ("probed",)),
}


@dataclass(frozen=True)
class Trial:
    """A strategy that was tried.

    Attributes:
        number: 0 for the first one; without gaps.
        strategy: what was tried.
        value: the metric on the attacker's ``select`` split: at the end of a ``complete`` trial, at ``step`` of a
            ``pruned`` one, None of a ``failed`` one.
        state: ``complete``; ``pruned``, stopped by the median rule; or ``failed``: it diverged.
        step: fine-tuning steps up to the last finite value that it reported; all of them for a ``complete`` one.
    """

    number: int
    strategy: FineTuneStrategy
    value: float | None
    state: str
    step: int


def check(name: str, config: SearchConfig) -> None:
    """Check the choices of the search called ``name``; `sophon.config.validate` sees to all else.

    Raises:
        UserError: a field is unknown or not to be chosen here, or has no values or one outside its range.
    """
    for part, values in config.choices.items():
        key = f"attack.search.{name}.choices.{part}"
        if part in ("optimizer", "lr"):
            raise UserError(f"{key}: not allowed here; give attack.search.{name}.optimizers")
        if part == "steps":
            raise UserError(f"{key}: not allowed here; give attack.search.{name}.steps")
        choose(f"attack.search.{name}.choices", part, _FIELDS)
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"{key}: {values} is not allowed; give a list of at least one value")
        for index, value in enumerate(values):
            check_field(f"{key}[{index}]", part, value)


def suggest(config: SearchConfig, trial: BaseTrial) -> FineTuneStrategy:
    """Take a strategy of the search's space from an optuna trial; from a finished one, the strategy that it had.

    Each optimizer has a parameter ``lr.NAME`` of its own: good rates of one say nothing about another's. A field that
    does nothing beside the values suggested before it is not suggested, and keeps its default.
    """
    ranges = {name: limits for name, limits in config.optimizers.items() if limits is not None}
    optimizer = str(trial.suggest_categorical("optimizer", sorted(ranges)))
    low, high = ranges[optimizer]
    chosen: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": trial.suggest_float(f"lr.{optimizer}", low, high, log=True),
        "steps": config.steps,
    }
    for part in sorted(config.choices, key=lambda part: (part in _CONDITIONS, part)):
        on, values = _CONDITIONS.get(part, (part, None))
        if values is None or chosen.get(on, getattr(FineTuneStrategy, on)) in values:
            chosen[part] = _choose(trial, part, config.choices[part])
    return FineTuneStrategy(**chosen)


def _choose(trial: BaseTrial, part: str, values: Sequence[Any]) -> Any:
    if part != "surgery":
        return trial.suggest_categorical(part, values)
    # a categorical parameter holds no lists
    texts = [json.dumps([operation.plain() for operation in operations_from(part, entries)]) for entries in values]
    return operations_from(part, json.loads(trial.suggest_categorical(part, texts)))


def run_search(
    config: SearchConfig,
    *,
    storage: Path,
    seed: int,
    higher_is_better: bool,
    evaluate: Evaluate,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Run the trials that the search still lacks; return the first ``config.trials``.

    Args:
        config: the search; a search whose ``trials`` or ``seeds`` alone have changed goes on.
        storage: the search's own JSON file; made if it is not there.
        higher_is_better: whether ``evaluate`` returns what is to be maximised.
        evaluate: fine-tunes as the strategy says and returns the final metric, or None or a number that is not finite
            if that diverged. It calls the ``report(step, value)`` that it is given at the points of its curve and lets
            pass the `optuna.TrialPruned` by which that stops the trial; ``report`` never does so at step 0 nor at the
            last one. To be repeatable it may depend on the strategy only. Any other exception ends the search with
            this trial untried.

    Raises:
        UserError: the file is damaged, belongs to another search or cannot be written.
    """
    identity = _identity(config, seed, higher_is_better)
    with explained(storage, "write"):
        storage.parent.mkdir(parents=True, exist_ok=True)
    with _quiet(), lock(storage.with_suffix(".lock"), wait=True):
        kept = _stored(storage, config, identity)[: config.trials] if exists(storage) else []
        while len(kept) < config.trials:
            study = _study(config, derive_seed(seed, "search", len(kept)), higher_is_better)
            study.add_trials(kept)
            kept.append(_run_trial(study, config, higher_is_better, evaluate))
            write_json(storage, {"identity": identity, "trials": [_plain(frozen) for frozen in kept]})
            on_trial(_trial(config, kept[-1]))
        return [_trial(config, frozen) for frozen in kept]


def _stored(path: Path, config: SearchConfig, identity: dict[str, Any]) -> list[FrozenTrial]:
    """Read the trials of a search's file; it has to be the search with this identity."""
    stored = read_json(path)
    try:
        differing = [key for key in identity if stored["identity"].get(key) != identity[key]]
        worst = _worst(identity["higher_is_better"])
        trials = [_frozen(number, plain, worst) for number, plain in enumerate(stored["trials"])]
        for frozen in () if differing else trials:
            suggest(config, frozen)  # raises what is not of this space
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"cannot read {path} as a search: {one_line(error)}; delete this file to search anew"
        ) from error
    if differing:
        raise UserError(f"{path} belongs to a search with another {differing[0]}; delete this file to search anew")
    return trials


def _plain(frozen: FrozenTrial) -> dict[str, Any]:
    """Return an optuna trial as JSON data; the infinitely bad value of one that diverged is None."""
    return {
        "state": frozen.state.name,
        "value": frozen.value if frozen.value is not None and math.isfinite(frozen.value) else None,
        "params": frozen.params,
        "distributions": {name: distribution_to_json(kind) for name, kind in frozen.distributions.items()},
        "reported": sorted(frozen.intermediate_values.items()),
    }


def _frozen(number: int, plain: dict[str, Any], worst: float) -> FrozenTrial:
    """Undo `_plain`; ``worst`` is the value of a trial that diverged."""
    frozen = optuna.create_trial(
        state=TrialState[plain["state"]],
        value=worst if plain["value"] is None else plain["value"],
        params=plain["params"],
        distributions={name: json_to_distribution(kind) for name, kind in plain["distributions"].items()},
        intermediate_values=dict(plain["reported"]),
    )
    frozen.number = number
    return frozen


def best(trials: Sequence[Trial], higher_is_better: bool) -> Trial | None:
    """Return the best of the complete trials, of equals the earliest; None if there is none."""
    complete = [trial for trial in trials if trial.state == "complete"]
    return (max if higher_is_better else min)(complete, key=attrgetter("value"), default=None)


def _study(config: SearchConfig, seed: int, higher_is_better: bool) -> optuna.Study:
    sampler: optuna.samplers.BaseSampler
    if config.sampler == "tpe":
        sampler = optuna.samplers.TPESampler(n_startup_trials=config.startup, seed=seed % 2**32)
    else:
        sampler = optuna.samplers.RandomSampler(seed=seed % 2**32)
    pruner = optuna.pruners.MedianPruner(config.startup) if config.prune else optuna.pruners.NopPruner()
    return optuna.create_study(sampler=sampler, pruner=pruner, direction="maximize" if higher_is_better else "minimize")


def _worst(higher_is_better: bool) -> float:
    """Return the value of a trial that diverged.

    TPE overlooks failed trials and would propose the like again. An infinitely bad value makes it keep away: it only
    ever ranks values, so this one distorts nothing.
    """
    return -math.inf if higher_is_better else math.inf


def _run_trial(study: optuna.Study, config: SearchConfig, higher_is_better: bool, evaluate: Evaluate) -> FrozenTrial:
    trial = study.ask()

    def report(step: int, value: float) -> None:
        # Before the first step a strategy has done nothing; and what is not finite has no place in a median.
        if step > 0 and math.isfinite(value):
            trial.report(value, step)
            if step < config.steps and trial.should_prune():
                raise optuna.TrialPruned

    try:
        value = evaluate(suggest(config, trial), report)
    except optuna.TrialPruned:
        return study.tell(trial, state=TrialState.PRUNED)
    diverged = value is None or not math.isfinite(value)
    return study.tell(trial, _worst(higher_is_better) if diverged else value)


def _trial(config: SearchConfig, frozen: FrozenTrial) -> Trial:
    strategy, value, step = suggest(config, frozen), frozen.value, frozen.last_step or 0
    if frozen.state == TrialState.PRUNED:
        return Trial(frozen.number, strategy, value, "pruned", step)
    if value is None or not math.isfinite(value):
        return Trial(frozen.number, strategy, None, "failed", step)
    return Trial(frozen.number, strategy, value, "complete", config.steps)


def _identity(config: SearchConfig, seed: int, higher_is_better: bool) -> dict[str, Any]:
    """Return what decides the trials, as plain JSON data; neither how many there are nor what follows them does."""
    facts = {key: value for key, value in asdict(config).items() if key not in ("trials", "seeds")}
    identity: dict[str, Any] = json.loads(json.dumps({**facts, "seed": seed, "higher_is_better": higher_is_better}))
    return identity


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep optuna from reporting each study and trial on stderr."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(verbosity)
