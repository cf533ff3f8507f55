"""The worst case of several attacks, read in two ways."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sophon.auditing.gap_closed import Gap, Judgement, gap_closed
from sophon.auditing.scores import Score
from sophon.auditing.words import in_order
from sophon.tasks import Metric

if TYPE_CHECKING:
    from sophon.auditing.attack_scores import Attack


@dataclass(frozen=True)
class Reading:
    """One reading of a worst case: which attack each role suffers, its score, and what follows from these.

    Attributes:
        attacks: by role.
        roles: their scores.
        gap_closed: against scratch.
        removal: R, against the filtered model that counts; None without one.
    """

    attacks: dict[str, str]
    roles: dict[str, Score]
    gap_closed: Gap
    removal: Gap | None


@dataclass(frozen=True)
class WorstCase:
    """The worst of some attacks, read in two ways.

    Attributes:
        tried: their names.
        own_best: each role under its own best attack.
        same_attack: the attack that gets most out of the protected model, against all roles.
        decided_by: ``own_best`` or ``same_attack``, whichever gap closed is worse for the defender.
        state: what is made of it.
        removal: the worse of the two readings' R; None without a filtered model.
    """

    tried: list[str]
    own_best: Reading
    same_attack: Reading
    decided_by: str
    state: Judgement
    removal: Gap | None

    @property
    def deciding(self) -> Reading:
        """Return the reading that decides."""
        return self.own_best if self.decided_by == "own_best" else self.same_attack

    @property
    def readings_differ(self) -> bool:
        """Return whether the two readings are of different attacks."""
        return self.own_best.attacks != self.same_attack.attacks


def worst_case(attacks: Sequence[Attack], metric: Metric, filtered: str | None = None) -> WorstCase:
    """Read the worst case of at least one attack in both ways; attackers choose by the mean end of ``select``.

    ``filtered`` is the role of the filtered model that removal is measured against.

    The intervals take the choice of attacks as given: they say how seeds and test images scatter, not how the choice
    might have fallen.
    """
    best: dict[str, Attack] = {}
    for role in in_order({role for attack in attacks for role in attack.roles}):
        tried = [attack for attack in attacks if role in attack.roles and attack.roles[role].seeds]
        if tried:
            best[role] = max(tried, key=lambda a: (metric.sign * a.roles[role].select, a.attack))
    own = _reading(best, metric, filtered)
    alike = dict.fromkeys(best["protected"].roles, best["protected"]) if "protected" in best else {}
    same = _reading(alike, metric, filtered)
    decided = _worse(own.gap_closed, same.gap_closed)
    removal = None
    if own.removal and same.removal:
        removal = own.removal if _worse(own.removal, same.removal) == "own_best" else same.removal
    state = (own if decided == "own_best" else same).gap_closed.state
    return WorstCase([attack.attack for attack in attacks], own, same, decided, state, removal)


def _worse(own_best: Gap, same_attack: Gap) -> str:
    """Name the reading that is worse for the defender; what one shows to be broken, the other cannot mend."""
    readings = {"own_best": own_best, "same_attack": same_attack}
    known = {name: gap for name, gap in readings.items() if not math.isnan(gap.value)}
    return min(known, key=lambda name: (known[name].state != Judgement.BROKEN, known[name].value), default="own_best")


def _reading(chosen: Mapping[str, Attack], metric: Metric, filtered: str | None) -> Reading:
    roles = {role: attack.roles[role] for role, attack in chosen.items()}
    attacks = {role: attack.attack for role, attack in chosen.items()}
    return Reading(attacks, roles, gap_closed(roles, metric), gap_closed(roles, metric, filtered) if filtered else None)
