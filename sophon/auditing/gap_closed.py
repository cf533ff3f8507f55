"""Gap closed and removal R: what protection takes off the attacker's gain, with an interval, and the word for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from sophon.auditing.scores import Score
from sophon.auditing.words import counted
from sophon.tasks import Metric

# Pre-training must be worth at least this much over scratch: in points of percentages, else as a part of scratch.
MIN_GAP_POINTS = 1.0
MIN_GAP_RELATIVE = 0.01
# Gap closed is 0 where the protected model is as good a start as the unprotected one and 1 where it is no better than
# scratch, which is what protection promises. The burden of proof is protection's: to hold it needs an interval above
# the middle, to be broken only one that leaves out holding.
NO_PROTECTION_BELOW = 0.1
HOLDS_FROM = 0.9
MIDDLE = 0.5


class Judgement(StrEnum):
    """The judgement on a gap closed."""

    BROKEN = "BROKEN"
    WEAKENED = "WEAKENED"
    HOLDS = "HOLDS"
    UNKNOWN = "CANNOT BE JUDGED"


@dataclass(frozen=True)
class Gap:
    """Gap closed, (unprotected - protected) / (unprotected - scratch), or removal, R, with filtered for scratch.

    Attributes:
        value: 0 for no protection, 1 for no better a start than the yardstick, scratch or filtered.
        low: where its interval begins; NaN where it has none.
        high: where it ends.
        reason: why there is no value or no interval, or "".
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    reason: str = ""

    @property
    def state(self) -> Judgement:
        """Return the word for it."""
        if self.value >= HOLDS_FROM and self.low >= MIDDLE:
            return Judgement.HOLDS
        if self.value < NO_PROTECTION_BELOW and self.high < HOLDS_FROM:
            return Judgement.BROKEN
        if NO_PROTECTION_BELOW <= self.value < HOLDS_FROM and self.low > 0:
            return Judgement.WEAKENED
        return Judgement.UNKNOWN


def gap_closed(roles: Mapping[str, Score], metric: Metric, yardstick: str = "scratch") -> Gap:
    """Return (unprotected - protected) / (unprotected - yardstick), with Fieller's interval of a ratio of differences.

    Args:
        yardstick: ``scratch`` for gap closed, the role of a filtered model for removal, R.
    """
    needed = ("protected", "unprotected", yardstick)
    scores = {role: roles[role] for role in needed if role in roles and roles[role].seeds}
    if missing := [role for role in needed if role not in scores]:
        return Gap(reason=f"no result of {' and '.join(missing)}")
    p, u, s = scores.values()
    loss, gap = u.mean - p.mean, u.mean - s.mean
    least = MIN_GAP_POINTS if metric.unit == "%" else MIN_GAP_RELATIVE * abs(s.mean)
    if not max(least, 0.0) <= metric.sign * gap or gap == 0:
        return Gap(reason=f"unprotected is not clearly better than {yardstick}")
    value = loss / gap
    if not math.isfinite(value):
        return Gap(reason="the results are too large to compare")
    # The ends are the ratios r at which (u - p) - r (u - s) is as large as its own error; all in units of the gap.
    p2, u2, s2 = ((score.half / gap) * (score.half / gap) for score in (p, u, s))
    square = 1 - u2 - s2
    if not square > 0:
        images = min(p.test_images, u.test_images, s.test_images)
        basis = f"{counted(images, 'test image')} and {counted(u.seeds, 'seed')}"
        reason = f"unprotected and {yardstick} differ by less than the error of {basis}"
        return Gap(value, reason=reason)
    linear, constant = value - u2, value * value - u2 - p2
    root = math.sqrt(max(linear * linear - square * constant, 0.0))
    return Gap(value, (linear - root) / square, (linear + root) / square)
