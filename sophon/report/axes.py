"""Attacks that differ in one thing only, in a page: their length, their learning rate, or their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sophon.auditing.comparisons import Axis
from sophon.auditing.results import Results
from sophon.auditing.words import known
from sophon.report.page import Element, Table, folded
from sophon.report.tables import name, percent, ratio, removal_cells, shown


def decay(results: Results) -> Iterator[Element]:
    """Yield what attacks come to that differ only in their number of steps."""
    lengths = _table(results, results.decay, "steps")
    if lengths.rows:
        yield (
            "Attacks that differ only in their number of steps, on the test split. What falls towards 0 says that an "
            "attacker needs only patience."
        )
        yield folded("All lengths", lengths, len(lengths.rows))


def shots(results: Results) -> Iterator[Element]:
    """Yield what attacks come to that differ only in how many images there are to learn from."""
    counts = _table(results, results.shots, "images")
    if counts.rows:
        yield "Attacks that differ only in how many images the attacker has, on the test split."
        yield folded("All numbers of images", counts, len(counts.rows))


def recovery(results: Results) -> Iterator[Element]:
    """Yield how many steps each role takes to recover, by learning rate."""
    rows = [
        [name(attack), f"{rate:g}", *(_steps(steps.get(role)) for role in shown(results))]
        for axis in results.rates
        for attack, rate, steps in zip(axis.attacks, axis.values, axis.recovery, strict=True)
    ]
    if rows:
        yield (
            "Attacks that differ only in their learning rate: after how many steps each model, on select, first comes "
            "within a tenth of the gap of where the unprotected one ends."
        )
        yield folded("All learning rates", Table(["attack", "rate", *shown(results)], rows), len(rows))


def _table(results: Results, axes: Sequence[Axis], title: str) -> Table:
    rows = [
        [
            *(name(attack), "all" if value is None else f"{value:g}", percent(sgrc), ratio(closed.value)),
            *removal_cells(results, ratio(removed.value) if removed else "-"),
        ]
        for axis in axes
        for attack, value, sgrc, closed, removed in zip(
            axis.attacks, axis.values, axis.sgrc, axis.gap_closed, axis.removal, strict=True
        )
    ]
    return Table(["attack", title, "SGRC", "gap closed", *removal_cells(results, "R")], rows)


def _steps(steps: float | None) -> str:
    return "-" if steps is None else f"{steps:.0f}" if known(steps) else "never"
