"""Attacks beside others that differ from them in one thing: in length, in rate, in images, or in surgery."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sophon.auditing.attack_scores import Attack
from sophon.auditing.gap_closed import NO_PROTECTION_BELOW, Gap

# Surgery that takes scale away and leaves the function as it is. Resetting affine parameters does not: what an attack
# loses by that says nothing about masking.
UNDOING = ("renormalise",)


@dataclass(frozen=True)
class Axis:
    """Attacks that differ in one thing only, by its value, the smallest first.

    Attributes:
        attacks: their names.
        values: steps, learning rates or images; None for all images.
        sgrc: of each.
        gap_closed: of each.
        removal: of each; None without a filtered model.
        recovery: of each, by role the steps to recover.
    """

    attacks: list[str]
    values: list[float | None]
    sgrc: list[float]
    gap_closed: list[Gap]
    removal: list[Gap | None]
    recovery: list[dict[str, float]]


@dataclass(frozen=True)
class Undone:
    """An attack beside the same ``without`` the surgery ``operations``, which take scale away.

    ``share`` is the part of the protection against the other that they undo: below 0 where they help the defender, NaN
    where there is none to undo (less than `NO_PROTECTION_BELOW`, or an interval that reaches 0) or a gap is not known.
    """

    attack: str
    without: str
    operations: list[dict[str, Any]]
    gap_closed: float
    gap_closed_without: float
    share: float


def _without(attack: Attack, *fields: str) -> str:
    return json.dumps({key: value for key, value in attack.strategy.items() if key not in fields}, sort_keys=True)


def axes_of(attacks: Iterable[Attack], field: str, *besides: str) -> list[Axis]:
    """Set attacks beside those that differ from them in ``field`` of their strategy only, and in ``besides``."""
    alike: dict[str, list[Attack]] = {}
    for attack in sorted(attacks, key=lambda a: (_place(a.strategy[field]), a.attack)):
        if not attack.trials:
            alike.setdefault(_without(attack, field, *besides), []).append(attack)
    axes = [
        Axis(
            [a.attack for a in group],
            [a.strategy[field] for a in group],
            [a.sgrc for a in group],
            [a.gap_closed for a in group],
            [a.removal for a in group],
            [a.recovery for a in group],
        )
        for group in alike.values()
    ]
    return sorted((axis for axis in axes if len(set(axis.values)) > 1), key=lambda axis: axis.attacks)


def _place(value: float | None) -> float:
    return math.inf if value is None else value


def undone_of(attacks: Iterable[Attack]) -> list[Undone]:
    """Set attacks beside those that they differ from only by `UNDOING` surgery, in the order of names."""
    parted = []
    for attack in sorted((a for a in attacks if not a.trials), key=lambda a: a.attack):
        surgery = attack.strategy["surgery"]
        rest = [operation for operation in surgery if operation["operation"] not in UNDOING]
        operations = [operation for operation in surgery if operation["operation"] in UNDOING]
        parted.append((attack, operations, _without(attack, "surgery") + json.dumps(rest)))
    plain = {key: attack for attack, operations, key in reversed(parted) if not operations}
    pairs = []
    for attack, operations, key in parted:
        if operations and key in plain:
            gap, without = attack.gap_closed.value, plain[key].gap_closed
            protected = without.value >= NO_PROTECTION_BELOW and without.low > 0
            share = 1 - gap / without.value if protected else math.nan
            pairs.append(Undone(attack.attack, plain[key].attack, operations, gap, without.value, share))
    return pairs
