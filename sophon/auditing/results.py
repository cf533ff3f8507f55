"""From the table of attempts to an audit's results: each attack's scores, worst cases, decay, controls, benign use."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from sophon.auditing.scores import (
    NO_PROTECTION_BELOW,
    Difference,
    Gap,
    Score,
    Spread,
    align,
    gap_closed,
    harm,
    score,
    sgrc,
    signed_area,
    spread,
    wide,
)
from sophon.auditing.table import Attempts
from sophon.auditing.words import EXPOSURES, ORACLE, ROLES, Record
from sophon.auditing.worst_case import WorstCase, worst_case
from sophon.tasks import Metric

Roles = dict[str, Score]

# What sets attacks apart. A search, in which each role has a strategy of its own, is in no other family; any other
# attack is in each that fits it; one that fits none is ``plain``.
FAMILIES: dict[str, Callable[[Record], bool]] = {
    "surgery": lambda strategy: bool(strategy["surgery"]),
    "lora": lambda strategy: bool(strategy["scope"] == "lora"),
    "partial": lambda strategy: strategy["scope"] in ("head", "first_blocks", "last_blocks", "attention"),
    "few_shot": lambda strategy: strategy["data_budget"] is not None,
}
# Surgery that takes scale away and leaves the function as it is. Resetting affine parameters does not: what an attack
# loses by that says nothing about masking.
UNDOING = ("renormalise",)


@dataclass(frozen=True)
class Attack:
    """An attack's scores.

    Attributes:
        attack: its name.
        strategy: the protected model's, as plain data; of a search, roles have their own.
        trials: of the search that found it; 0 without.
        exposure: one of `sophon.auditing.words.EXPOSURES`.
        outside: in what it lies outside of what protection simulated.
        roles: by role, of those that were tried.
        gap_closed: of this attack against all three roles.
        sgrc: in percent.
        signed_area: between the mean curves of protected and unprotected.
    """

    attack: str
    strategy: dict[str, Any]
    trials: int
    exposure: str
    outside: str
    roles: Roles
    gap_closed: Gap
    sgrc: float
    signed_area: float

    @property
    def families(self) -> list[str]:
        """Return the families that it is in."""
        fits = [name for name, fitting in FAMILIES.items() if fitting(self.strategy)]
        return ["search"] if self.trials else fits or ["plain"]


@dataclass(frozen=True)
class Decay:
    """Attacks that differ only in how long they last, from the shortest to the longest."""

    attacks: list[str]
    steps: list[int]
    sgrc: list[float]
    gap_closed: list[Gap]


@dataclass(frozen=True)
class Undone:
    """An attack beside the same ``without`` the surgery ``operations``, which take scale away.

    ``share`` is the part of the protection against the other that they undo: below 0 where they help the defender, NaN
    where there is none to undo (less than `NO_PROTECTION_BELOW`) or a gap is not known.
    """

    attack: str
    without: str
    operations: list[dict[str, Any]]
    gap_closed: float
    gap_closed_without: float
    share: float


@dataclass(frozen=True)
class Oracle:
    """The unprotected model, fine-tuned with ``data_ratio`` times the data."""

    attack: str
    data_ratio: float
    score: Score


@dataclass(frozen=True)
class Benign:
    """Fine-tuning on the benign domain, which protection should not harm."""

    attack: str
    roles: Roles
    harm: Difference
    sgrc: float


@dataclass(frozen=True)
class Results:
    """Everything that follows from the attempts alone.

    What counts as an attack that was tried: what was run on the restricted domain for at least one step, whether or not
    it diverged, and of a search its winner. Not the oracle, whose data an attacker lacks, nor models that were not
    fine-tuned (``no_attack``, by name and role), nor benign fine-tuning.
    """

    metric: Metric
    attacks: list[Attack]
    worst_case: dict[str, WorstCase]
    families: dict[str, WorstCase]
    decay: list[Decay]
    no_attack: dict[str, Roles]
    oracle: Oracle | None
    benign: list[Benign]
    undone: list[Undone]

    @property
    def masked_share(self) -> float:
        """Return the median share of protection that taking scale away undoes."""
        shares = [pair.share for pair in self.undone if not math.isnan(pair.share)]
        return median(shares) if shares else math.nan

    @property
    def worst_harm(self) -> Benign | None:
        """Return the benign fine-tuning that loses most."""
        return max(
            (each for each in self.benign if not math.isnan(each.harm.value)),
            key=lambda each: each.harm.value,
            default=None,
        )


@np.errstate(all="ignore")  # divergent attacks may overflow
def results(attempts: Attempts) -> Results:
    """Score an audit's attempts."""
    table = attempts.table
    first = table.iloc[0]
    metric = Metric(str(first["metric"]), str(first["unit"]), bool(first["higher_is_better"]))
    restricted = table[table["domain"] == "restricted"]
    compared = restricted[restricted["role"] != ORACLE]
    fine_tuned = compared["steps"] > 0
    usual, curves = _spreads(compared[fine_tuned]), wide(attempts.curves)
    attacks = [_attack(str(name), rows, curves, metric, usual) for name, rows in compared[fine_tuned].groupby("attack")]
    attacks.sort(key=lambda each: EXPOSURES.index(each.exposure))
    groups = {"overall": attacks} | {name: [a for a in attacks if a.exposure == name] for name in EXPOSURES}
    families = {name: [a for a in attacks if name in a.families] for name in ("search", *FAMILIES, "plain")}
    return Results(
        metric,
        attacks,
        {name: worst_case(group, metric) for name, group in groups.items() if group},
        {name: worst_case(group, metric) for name, group in families.items() if group},
        _decay(attacks),
        {str(name): _roles(rows, metric, _spreads(rows)) for name, rows in compared[~fine_tuned].groupby("attack")},
        _oracle(restricted[restricted["role"] == ORACLE], metric),
        _benign(table[(table["domain"] == "benign") & (table["steps"] > 0)], metric),
        _undone(attacks),
    )


def _roles(rows: pd.DataFrame, metric: Metric, usual: Mapping[str, Spread]) -> Roles:
    found = {str(role): score(part, metric, usual[str(role)]) for role, part in rows.groupby("role")}
    return {role: found[role] for role in ROLES if role in found}


def _spreads(rows: pd.DataFrame) -> dict[str, Spread]:
    return {str(role): spread(part) for role, part in rows.groupby("role")}


def _attack(name: str, rows: pd.DataFrame, curves: pd.DataFrame, metric: Metric, usual: Mapping[str, Spread]) -> Attack:
    # Exposure and strategy are the protected checkpoint's; a scratch model may have had to start its head otherwise.
    first = rows.sort_values("role", key=lambda role: role.map(ROLES.index)).iloc[0]
    roles = _roles(rows, metric, usual)
    kept = rows[~rows["diverged"]]
    mean = {role: align(curves[kept.loc[kept["role"] == role, "id"]]).mean(axis=1) for role in ROLES[:2]}
    return Attack(
        name,
        json.loads(first["strategy"]),
        int(first["trials"]),
        str(first["exposure"]),
        str(first["outside"]),
        roles,
        gap_closed(roles, metric),
        _sgrc(roles, metric),
        signed_area(mean["protected"], mean["unprotected"], metric),
    )


def _sgrc(roles: Mapping[str, Score], metric: Metric) -> float:
    p, u = (roles.get(role, Score()).mean for role in ROLES[:2])
    return sgrc(p, u, metric)


def _without(attack: Attack, *fields: str) -> str:
    return json.dumps({key: value for key, value in attack.strategy.items() if key not in fields}, sort_keys=True)


def _decay(attacks: Iterable[Attack]) -> list[Decay]:
    alike: dict[str, list[Attack]] = {}
    for attack in sorted(attacks, key=lambda a: (a.strategy["steps"], a.attack)):
        if not attack.trials:
            alike.setdefault(_without(attack, "steps"), []).append(attack)
    found = [
        Decay(
            [a.attack for a in group],
            [a.strategy["steps"] for a in group],
            [a.sgrc for a in group],
            [a.gap_closed for a in group],
        )
        for group in alike.values()
    ]
    return sorted((each for each in found if len(set(each.steps)) > 1), key=lambda each: each.attacks)


def _oracle(rows: pd.DataFrame, metric: Metric) -> Oracle | None:
    """Score the oracle; of several, the best on ``select``."""
    found = [
        Oracle(str(name), float(mine["data_ratio"].iloc[0]), score(mine, metric, spread(rows)))
        for name, mine in rows.groupby("attack")
    ]
    return max(found, key=lambda each: (each.score.seeds > 0, metric.sign * each.score.select), default=None)


def _benign(rows: pd.DataFrame, metric: Metric) -> list[Benign]:
    found, usual = [], _spreads(rows)
    for name, mine in rows.groupby("attack"):
        roles = _roles(mine, metric, usual)
        p, u = (roles.get(role, Score()) for role in ROLES[:2])
        found.append(Benign(str(name), roles, harm(p, u, metric), _sgrc(roles, metric)))
    return found


def _undone(attacks: Iterable[Attack]) -> list[Undone]:
    """Set attacks beside those that they differ from only by `UNDOING` surgery, in the order of names."""
    parted = []
    for attack in sorted((a for a in attacks if not a.trials), key=lambda a: a.attack):
        surgery = attack.strategy["surgery"]
        rest = [each for each in surgery if each["operation"] not in UNDOING]
        operations = [each for each in surgery if each["operation"] in UNDOING]
        parted.append((attack, operations, _without(attack, "surgery") + json.dumps(rest)))
    plain = {key: attack for attack, operations, key in reversed(parted) if not operations}
    pairs = []
    for attack, operations, key in parted:
        if operations and key in plain:
            gap, without = attack.gap_closed.value, plain[key].gap_closed.value
            share = 1 - gap / without if without >= NO_PROTECTION_BELOW else math.nan
            pairs.append(Undone(attack.attack, plain[key].attack, operations, gap, without, share))
    return pairs
