"""The worst case of several attacks, read in two ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophon.auditing.scores import Gap, Score, State, gap_closed
from sophon.auditing.words import ROLES
from sophon.tasks import Metric

if TYPE_CHECKING:
    from sophon.auditing.results import Attack


@dataclass(frozen=True)
class Reading:
    """One reading of a worst case: which attack each role suffers, its score, and the gap closed of these."""

    attacks: dict[str, str]
    roles: dict[str, Score]
    gap_closed: Gap


@dataclass(frozen=True)
class WorstCase:
    """The worst of some attacks, read in two ways.

    Attributes:
        tried: their names.
        own_best: each role under its own best attack.
        same_attack: the attack that gets most out of the protected model, against all roles.
        decided_by: ``own_best`` or ``same_attack``, whichever is worse for the defender.
        state: what is made of it.
    """

    tried: list[str]
    own_best: Reading
    same_attack: Reading
    decided_by: str
    state: State

    @property
    def deciding(self) -> Reading:
        """Return the reading that decides."""
        return self.own_best if self.decided_by == "own_best" else self.same_attack

    @property
    def readings_differ(self) -> bool:
        """Return whether the two readings are of different attacks."""
        return self.own_best.attacks != self.same_attack.attacks


def worst_case(attacks: Sequence[Attack], metric: Metric) -> WorstCase:
    """Read the worst case of at least one attack in both ways; attackers choose by the mean end of ``select``.

    The intervals take the choice of attacks as given: they say how seeds and test images scatter, not how the choice
    might have fallen.
    """
    best: dict[str, Attack] = {}
    for role in ROLES:
        tried = [attack for attack in attacks if role in attack.roles and attack.roles[role].seeds]
        if tried:
            best[role] = max(tried, key=lambda a: (metric.sign * a.roles[role].select, a.attack))
    own = _reading(best, metric)
    same = _reading(dict.fromkeys(best["protected"].roles, best["protected"]) if "protected" in best else {}, metric)
    readings = {"own_best": own.gap_closed, "same_attack": same.gap_closed}
    known = {name: gap for name, gap in readings.items() if not math.isnan(gap.value)}
    # what one reading shows to be broken, the other cannot mend
    decided = min(known, key=lambda name: (known[name].state != State.BROKEN, known[name].value), default="own_best")
    return WorstCase([each.attack for each in attacks], own, same, decided, readings[decided].state)


def _reading(chosen: Mapping[str, Attack], metric: Metric) -> Reading:
    roles = {role: attack.roles[role] for role, attack in chosen.items()}
    return Reading({role: attack.attack for role, attack in chosen.items()}, roles, gap_closed(roles, metric))
