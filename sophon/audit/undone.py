"""What protection is worth once its scale is taken away: attacks after such surgery beside the same ones without it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from sophon.attacker import FineTuneStrategy
from sophon.audit.verdict import NO_PROTECTION_BELOW, Record

# Surgery that takes scale away and leaves the function as it is. Resetting affine parameters does not: what an attack
# loses by that says nothing about masking.
UNDOING = ("renormalise",)
_DEFAULTS = FineTuneStrategy().plain()


def undone(attacks: Sequence[Record]) -> dict[str, Any]:
    """Set attacks beside those that they differ from only by `UNDOING` surgery.

    Args:
        attacks: entries of the summary's ``attacks``; searches, whose strategies differ by role, are left out.

    Returns:
        ``pairs``, in the order of names: ``attack``, which has the ``operations`` (plain data) that ``without``, the
        other, lacks; ``gap_closed`` and ``gap_closed_without``; ``share``, the part of the protection against the other
        that the operations undo, 1 - gap_closed / gap_closed_without: below 0 where they help the defender, None where
        there is no protection to undo (less than `NO_PROTECTION_BELOW`) or a gap is not known. And ``share``, the
        median of these; None without any.
    """
    fixed = sorted((a for a in attacks if not a["search"]), key=lambda a: str(a["attack"]))
    others: dict[str, Record] = {}
    for attack in fixed:
        rest, operations = _parted(attack["strategy"])
        if not operations:
            others.setdefault(rest, attack)
    pairs = []
    for attack in fixed:
        rest, operations = _parted(attack["strategy"])
        if operations and (other := others.get(rest)):
            pairs.append(_pair(attack, other, operations))
    shares = [pair["share"] for pair in pairs if pair["share"] is not None]
    return {"pairs": pairs, "share": median(shares) if shares else None}


def _parted(strategy: Record) -> tuple[str, list[Record]]:
    """Return what identifies the strategy without its `UNDOING` surgery, and that surgery."""
    full = {**_DEFAULTS, **strategy}
    operations = [each for each in full["surgery"] if each["operation"] in UNDOING]
    rest = [each for each in full["surgery"] if each["operation"] not in UNDOING]
    return json.dumps({**full, "surgery": rest}, sort_keys=True), operations


def _pair(attack: Record, other: Record, operations: Sequence[Record]) -> dict[str, Any]:
    gap, without = (each["gap_closed"]["value"] for each in (attack, other))
    known = gap is not None and without is not None and without >= NO_PROTECTION_BELOW
    return {
        "attack": attack["attack"],
        "without": other["attack"],
        "operations": [dict(each) for each in operations],
        "gap_closed": gap,
        "gap_closed_without": without,
        "share": 1 - gap / without if known else None,
    }
