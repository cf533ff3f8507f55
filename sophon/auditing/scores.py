"""The formulas behind an audit's scores: a role's score, gap closed and removal, harm, SGRC and signed RFD.

Everything here is pure and deterministic. What is not known is NaN. Intervals hold 95 %: they add the sampling error of
the test images to Student's interval over the seeds, in quadrature, as the two are independent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sophon.tasks import Metric

Z = float(stats.norm.ppf(0.975))


@dataclass(frozen=True)
class Score:
    """One role's test result in an attack, over the attempts that did not diverge.

    Attributes:
        mean: over the attempts.
        half: half the width of its interval.
        low: where the interval begins, within what the metric can be.
        high: where it ends.
        seeds: how many attempts; of one, the interval knows nothing of the seeds.
        diverged: how many others diverged, after which an attacker would try again.
        test_images: how many each was measured on.
        select: mean of the curves' ends.
        values: of each attempt.
    """

    mean: float = math.nan
    half: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0
    diverged: int = 0
    test_images: int = 0
    select: float = math.nan
    values: tuple[float, ...] = ()


class Spread(NamedTuple):
    """The scatter of one role over seeds, pooled over attacks: standard deviation and degrees of freedom."""

    deviation: float = 0.0
    freedom: int = 0


NO_SPREAD = Spread()


def spread(attempts: pd.DataFrame) -> Spread:
    """Pool the scatter over seeds of one role's attempts at several attacks."""
    tests = attempts[~attempts["diverged"]].groupby("attack")["test"]
    freedom = tests.count() - 1
    total = int(freedom.sum())
    return Spread(float(np.sqrt((freedom * tests.var().fillna(0)).sum() / total)), total) if total else NO_SPREAD


def score(attempts: pd.DataFrame, metric: Metric, usual: Spread = NO_SPREAD) -> Score:
    """Score rows of the table of attempts: one attack against one role.

    Two or three seeds say little of how far they scatter, so an attack's spread is at least the ``usual`` one.
    """
    kept = attempts[~attempts["diverged"]]
    if kept.empty:
        return Score(diverged=len(attempts))
    tests = kept["test"].to_numpy(float)
    count, mean, (least, most) = len(tests), float(tests.mean()), metric.limits
    deviation = max(usual.deviation, float(tests.std(ddof=1)) if count > 1 else 0.0)
    quantile = float(stats.t.ppf(0.975, usual.freedom)) if usual.freedom else 0.0
    half = math.hypot(Z * float(kept["standard_error"].mean(skipna=False)), quantile * deviation / math.sqrt(count))
    return Score(
        mean,
        half,
        max(mean - half, least),
        min(mean + half, most),
        count,
        len(attempts) - count,
        int(kept["test_images"].min()),
        float(kept["select"].mean()),
        tuple(float(value) for value in tests),
    )


@dataclass(frozen=True)
class Difference:
    """A difference of two scores with its interval; positive where protection hurts."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


def harm(protected: Score, unprotected: Score, metric: Metric) -> Difference:
    """Return what protection takes from somebody who fine-tunes, in the metric's unit."""
    value = metric.sign * (unprotected.mean - protected.mean)
    half = math.hypot(unprotected.half, protected.half)
    return Difference(value, value - half, value + half)


def sgrc(protected: float, unprotected: float, metric: Metric) -> float:
    """Return CLAMP's SGRC in percent: what protection takes off the unprotected result; NaN if that is 0.

    Positive means that protection hurts the attacker, in both directions of the metric.
    """
    return metric.sign * 100 * (unprotected - protected) / abs(unprotected) if unprotected else math.nan


def align(curves: pd.DataFrame) -> pd.DataFrame:
    """Fill in curves, a column each by step, within the range of steps that all of them cover, and leave out the rest.

    Curves without a value are left out.
    """
    kept = curves.dropna(axis=1, how="all").dropna(how="all").sort_index()
    return kept.interpolate(method="index", limit_area="inside").dropna() if kept.shape[1] > 1 else kept.dropna()


def wide(points: pd.DataFrame) -> pd.DataFrame:
    """Return the ``select`` curves of attempts by step, a column an attempt."""
    return points.pivot(index="step", columns="id", values="select")


def signed_rfd(protected: pd.Series, unprotected: pd.Series, metric: Metric) -> float:
    """Return the signed RFD in percent: what protection takes off the unprotected curve, on average over its steps.

    The mean of (unprotected - protected) / unprotected over the steps that both curves cover, by the trapezoid rule;
    positive where protection hurts the attacker. NaN without two points, or where the unprotected curve is 0.
    """
    both = align(pd.DataFrame({"p": protected, "u": unprotected}))
    if both.shape[1] < 2 or len(both) < 2 or not both["u"].all():
        return math.nan
    steps = both.index.to_numpy(float)
    return float(metric.sign * 100 * np.trapezoid((both["u"] - both["p"]) / both["u"].abs(), steps) / np.ptp(steps))


def steps_to(curve: pd.Series, level: float, metric: Metric) -> float:
    """Return after how many steps a curve first reaches ``level``, between points in a straight line; NaN if never."""
    known = curve.dropna()
    reached = (metric.sign * (known - level) >= 0).to_numpy()
    if math.isnan(level) or not reached.any():
        return math.nan
    at = int(reached.argmax())
    if at == 0:
        return float(known.index[0])
    steps, values = known.index.to_numpy(float)[at - 1 : at + 1], known.to_numpy(float)[at - 1 : at + 1]
    return float(steps[0] + np.ptp(steps) * (level - values[0]) / (values[1] - values[0]))
