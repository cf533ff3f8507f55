"""From the table of attempts to an audit's results: each attack's scores, worst cases, decay, controls, benign use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import pandas as pd

from sophon.auditing.attack_scores import (
    FAMILIES,
    Attack,
    Roles,
    roles_of,
    score_attack,
    sgrc_of,
    signed_rfd_of,
    spreads,
)
from sophon.auditing.comparisons import Axis, Undone, axes_of, undone_of
from sophon.auditing.scores import (
    Difference,
    Score,
    harm,
    score,
    spread,
    wide,
)
from sophon.auditing.table import Attempts
from sophon.auditing.words import FILTERED, ORACLE, ROLES, in_order
from sophon.auditing.worst_case import Reading, WorstCase, worst_case
from sophon.held_out import EXPOSURES
from sophon.tasks import Metric


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
    signed_rfd: float


@dataclass(frozen=True)
class Results:
    """Everything that follows from the attempts alone.

    What counts as an attack that was tried: what was run on the restricted domain for at least one step, whether or not
    it diverged, and of a search its winner. Not the oracle, whose data an attacker lacks, nor models that were not
    fine-tuned (``no_attack``, by name and role), nor benign fine-tuning.

    ``roles`` are those that were compared, in order. Of several filtered models that one counts which its own best
    attack gets most out of, ``best_filtered``: protection is to be compared with the best features that a model can
    have which never saw the domain. ``decay``, ``rates`` and ``shots`` are attacks that differ only in their steps,
    their learning rate, or their images. The ``distillation_floor`` is the best attack that first distils the model
    into a fresh one with original images: no protection that keeps the original work can cost an attacker more.
    """

    metric: Metric
    roles: list[str]
    best_filtered: str | None
    attacks: list[Attack]
    worst_case: dict[str, WorstCase]
    families: dict[str, WorstCase]
    decay: list[Axis]
    rates: list[Axis]
    shots: list[Axis]
    distillation_floor: Reading | None
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
            (benign for benign in self.benign if not math.isnan(benign.harm.value)),
            key=lambda benign: benign.harm.value,
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
    usual, curves = spreads(compared[fine_tuned]), wide(attempts.curves)
    filtered = _best_filtered(compared[fine_tuned], metric)
    attacks = [
        score_attack(str(name), rows, curves, metric, usual, filtered)
        for name, rows in compared[fine_tuned].groupby("attack")
    ]
    attacks.sort(key=lambda attack: EXPOSURES.index(attack.exposure))
    groups = {"overall": attacks} | {name: [a for a in attacks if a.exposure == name] for name in EXPOSURES}
    families = {name: [a for a in attacks if name in a.families] for name in ("search", *FAMILIES, "plain")}
    return Results(
        metric,
        in_order({*ROLES, *compared["role"]}),
        filtered,
        attacks,
        {name: worst_case(group, metric, filtered) for name, group in groups.items() if group},
        {name: worst_case(group, metric, filtered) for name, group in families.items() if group},
        axes_of(attacks, "steps"),
        axes_of(attacks, "lr"),
        axes_of(attacks, "data_budget", "batch_size"),
        _distillation_floor(attacks, metric, filtered),
        {str(name): roles_of(rows, metric, spreads(rows)) for name, rows in compared[~fine_tuned].groupby("attack")},
        _oracle(restricted[restricted["role"] == ORACLE], metric),
        _benign(table[(table["domain"] == "benign") & (table["steps"] > 0)], curves, metric),
        undone_of(attacks),
    )


def _best_filtered(rows: pd.DataFrame, metric: Metric) -> str | None:
    """Name the filtered model whose own best attack does best on ``select``; None if none was attacked."""
    kept = rows[rows["role"].str.startswith(FILTERED) & ~rows["diverged"]]
    ends = metric.sign * kept.groupby(["role", "attack"])["select"].mean().groupby("role").max()
    return None if ends.empty else str(ends.idxmax())


def _distillation_floor(attacks: Sequence[Attack], metric: Metric, filtered: str | None) -> Reading | None:
    """Read what gets most out of a student of the protected model that has seen original images only."""
    students = [
        attack
        for attack in attacks
        if any(
            operation["operation"] == "distil" and operation.get("images") == "original"
            for operation in attack.strategy["surgery"]
        )
    ]
    return worst_case(students, metric, filtered).same_attack if students else None


def _oracle(rows: pd.DataFrame, metric: Metric) -> Oracle | None:
    """Score the oracle; of several, the best on ``select``."""
    oracles = [
        Oracle(str(name), float(attempts["data_ratio"].iloc[0]), score(attempts, metric, spread(rows)))
        for name, attempts in rows.groupby("attack")
    ]
    return max(oracles, key=lambda oracle: (oracle.score.seeds > 0, metric.sign * oracle.score.select), default=None)


def _benign(rows: pd.DataFrame, curves: pd.DataFrame, metric: Metric) -> list[Benign]:
    scored, usual = [], spreads(rows)
    for name, attempts in rows.groupby("attack"):
        roles = roles_of(attempts, metric, usual)
        p, u = (roles.get(role, Score()) for role in ROLES[:2])
        scored.append(
            Benign(
                str(name), roles, harm(p, u, metric), sgrc_of(roles, metric), signed_rfd_of(attempts, curves, metric)
            )
        )
    return scored
