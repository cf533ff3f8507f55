"""An attack's scores, from the rows of the table of attempts that belong to it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sophon.auditing.gap_closed import NO_PROTECTION_BELOW, Gap, gap_closed
from sophon.auditing.scores import Score, Spread, align, score, sgrc, signed_rfd, spread, steps_to
from sophon.auditing.words import ROLES, Record, in_order
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


@dataclass(frozen=True)
class Attack:
    """An attack's scores.

    Attributes:
        attack: its name.
        strategy: the protected model's, as plain data; of a search, roles have their own.
        trials: of the search that found it; 0 without.
        exposure: one of `sophon.held_out.EXPOSURES`.
        outside: in what it lies outside of what protection simulated.
        roles: by role, of those that were tried.
        gap_closed: of this attack, against scratch.
        removal: R of this attack, against the filtered model that counts; None without one.
        sgrc: in percent, after the last step.
        signed_rfd: in percent, over the mean curves of protected and unprotected.
        recovery: by role, after how many steps its mean curve first comes within a tenth of the gap of where the
            unprotected one ends; NaN if it never does, or where there is no gap.
    """

    attack: str
    strategy: dict[str, Any]
    trials: int
    exposure: str
    outside: str
    roles: Roles
    gap_closed: Gap
    removal: Gap | None
    sgrc: float
    signed_rfd: float
    recovery: dict[str, float]

    @property
    def families(self) -> list[str]:
        """Return the families that it is in."""
        fits = [name for name, fitting in FAMILIES.items() if fitting(self.strategy)]
        return ["search"] if self.trials else fits or ["plain"]


def roles_of(rows: pd.DataFrame, metric: Metric, usual: Mapping[str, Spread]) -> Roles:
    """Score rows of the table of attempts by role, in order; ``usual`` is each role's spread over several attacks."""
    scores = {str(role): score(part, metric, usual[str(role)]) for role, part in rows.groupby("role")}
    return {role: scores[role] for role in in_order(scores)}


def spreads(rows: pd.DataFrame) -> dict[str, Spread]:
    """Return each role's scatter over seeds, pooled over the attacks in ``rows``."""
    return {str(role): spread(part) for role, part in rows.groupby("role")}


def score_attack(
    name: str,
    rows: pd.DataFrame,
    curves: pd.DataFrame,
    metric: Metric,
    usual: Mapping[str, Spread],
    filtered: str | None,
) -> Attack:
    """Score one attack's rows of the table of attempts; ``filtered`` is the role that removal is measured against."""
    # Exposure and strategy are the protected checkpoint's; a scratch model may have had to start its head otherwise.
    first = rows.sort_values("role", key=lambda role: role.map(in_order(role).index)).iloc[0]
    roles = roles_of(rows, metric, usual)
    return Attack(
        name,
        json.loads(first["strategy"]),
        int(first["trials"]),
        str(first["exposure"]),
        str(first["outside"]),
        roles,
        gap_closed(roles, metric),
        gap_closed(roles, metric, filtered) if filtered else None,
        sgrc_of(roles, metric),
        signed_rfd_of(rows, curves, metric),
        _recovery(rows, curves, metric),
    )


def _recovery(rows: pd.DataFrame, curves: pd.DataFrame, metric: Metric) -> dict[str, float]:
    means = {role: _mean_curve(rows, curves, role) for role in in_order(rows["role"])}
    ends = {role: float(mean.iloc[-1]) if len(mean) else math.nan for role, mean in means.items()}
    u, s = (ends.get(role, math.nan) for role in ROLES[1:])
    level = u - NO_PROTECTION_BELOW * (u - s) if metric.sign * (u - s) > 0 else math.nan
    return {role: steps_to(mean, level, metric) for role, mean in means.items()}


def _mean_curve(rows: pd.DataFrame, curves: pd.DataFrame, role: str) -> pd.Series:
    return align(curves[rows.loc[(rows["role"] == role) & ~rows["diverged"], "id"]]).mean(axis=1)


def signed_rfd_of(rows: pd.DataFrame, curves: pd.DataFrame, metric: Metric) -> float:
    """Return the signed RFD of one attack's rows, of the mean curves of those that did not diverge."""
    protected, unprotected = (_mean_curve(rows, curves, role) for role in ROLES[:2])
    return signed_rfd(protected, unprotected, metric)


def sgrc_of(roles: Mapping[str, Score], metric: Metric) -> float:
    """Return the SGRC of scores by role."""
    p, u = (roles.get(role, Score()).mean for role in ROLES[:2])
    return sgrc(p, u, metric)
