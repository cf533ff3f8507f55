"""Heat maps: which results are good for the attacker, at a glance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sophon.audit.scores import sign_of
from sophon.audit.verdict import EXPOSURES, Record
from sophon.report.document import Heat
from sophon.report.figures import EXPOSURE_WORDS
from sophon.report.tables import SHOWN_ROLES, gap, name, number

Row = tuple[str, list[tuple[str, int | None]]]

# Rows of a block: what a screen shows without scrolling; wide screens have two blocks side by side.
_ROWS = 28


def strengths(values: Sequence[float | None], metric: Record) -> list[int | None]:
    """Return how good each value is for the attacker among all of them, 0 (worst) .. 100 (best); None for None.

    Percentages are compared by differences; other units, whose values span orders of magnitude, by ratios where all
    are positive.
    """
    known = [value for value in values if value is not None]
    ratios = metric["unit"] != "%" and all(value > 0 for value in known)

    def place(value: float) -> float:
        return sign_of(metric) * (math.log(value) if ratios else value)

    if not known:
        return [None] * len(values)
    low, high = min(map(place, known)), max(map(place, known))
    span = high - low
    if not 0 < span < math.inf:
        return [None] * len(values)
    return [None if value is None else round(100 * ((place(value) - low) / span)) for value in values]


def gap_strength(value: float | None) -> int | None:
    """Return how good a gap closed is for the attacker: 100 for 0 and below, 0 for 1 and above; None for None."""
    return None if value is None else round(100 * min(max(1 - value, 0.0), 1.0))


def blocks(rows: Mapping[str, Sequence[Row]], most: int = _ROWS) -> dict[str, Sequence[Row]]:
    """Cut long groups of rows into blocks of about equal length; captions say what part of which group they are."""
    found: dict[str, Sequence[Row]] = {}
    for caption, group in rows.items():
        parts = math.ceil(len(group) / most)
        size = math.ceil(len(group) / parts) if parts else 0
        for start in range(0, len(group), size or 1):
            part = group[start : start + size]
            of = f", {start + 1} to {start + len(part)} of {len(group)}" if parts > 1 else ""
            found[caption + of] = part
    return found


def attack_map(summary: Record) -> Heat:
    """Return every attack's test result by role, and gap closed; in each group what the protected model suffers most
    from comes first.
    """
    attacks, metric = summary["attacks"], summary["metric"]
    means = [(attack["roles"].get(role) or {}).get("mean") for attack in attacks for role in SHOWN_ROLES]
    scale = strengths(means, metric)
    width = len(SHOWN_ROLES)
    rows: dict[str, list[tuple[float, Row]]] = {}
    for index, attack in enumerate(attacks):
        here = slice(index * width, (index + 1) * width)
        cells = [(number(mean, metric), level) for mean, level in zip(means[here], scale[here], strict=True)]
        closed = attack["gap_closed"]
        cells.append((gap({**closed, "ci95": None}), gap_strength(closed["value"])))
        protected = means[here][-1]
        order = math.inf if protected is None else -sign_of(metric) * protected
        rows.setdefault(attack["exposure"], []).append((order, (name(attack["attack"]), cells)))
    groups = {
        EXPOSURE_WORDS[exposure]: [row for _, row in sorted(rows[exposure], key=lambda each: each[0])]
        for exposure in EXPOSURES
        if exposure in rows
    }
    return Heat(["attack", *SHOWN_ROLES, "gap closed"], blocks(groups), ("bad for the attacker", "good"))
