"""Figures of what changes: a search's best over its trials, SGRC in the course of attacks and over their length."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sophon.audit.scores import sign_of
from sophon.audit.verdict import ROLES, Record
from sophon.report.figures import COLOURS, HUES, MARKERS, STYLE, shorten, spread, svg

_BOX = (0.13, 0.19, 0.62, 0.74)


def search_panels(searches: Sequence[Record], metric: Record) -> dict[str, str]:
    """Draw, for each search, every role's best value so far against the trials drawn, and the trials themselves.

    Args:
        searches: the summary's ``searches``.
        metric: ``name``, ``unit`` and ``higher_is_better``.

    Returns:
        SVG by the search's name; searches without a finite value are left out.
    """
    panels = {search["name"]: _search_panel(search, metric) for search in searches}
    return {name: panel for name, panel in panels.items() if panel}


def _search_panel(search: Record, metric: Record) -> str | None:
    trials = {role: search["roles"][role]["trials"] for role in ROLES if role in search["roles"]}
    values = [trial["value"] for found in trials.values() for trial in found if trial["value"] is not None]
    if not values:
        return None
    low, high = _limits(values, metric)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.1, 0.16, 0.7, 0.79))
        axes.set_ylim(low, high)
        ends = {}
        for role, found in trials.items():
            for pruned in (False, True):
                shown = [t for t in found if t["value"] is not None and (t["state"] == "pruned") is pruned]
                numbers = [trial["number"] + 1 for trial in shown]
                axes.plot(
                    numbers,
                    np.clip([trial["value"] for trial in shown], low, high),
                    color=COLOURS[role],
                    linestyle="",
                    alpha=0.55,
                    clip_on=False,
                    marker="x" if pruned else MARKERS[role],
                    markersize=3.2 if pruned else 2.4,
                )
            best = np.array(search["roles"][role]["best_so_far"], float)
            axes.step(np.arange(len(best)) + 1, best, where="post", color=COLOURS[role], linewidth=1.6)
            if len(best) and np.isfinite(best[-1]):
                ends[role] = float(best[-1])
        _end_labels(axes, ends, {role: (role, COLOURS[role]) for role in ends}, (low, high))
        axes.set_xlim(0.5, max(map(len, trials.values())) + 0.5)
        axes.grid(visible=True, axis="y")
        axes.set_xlabel("trials")
        return svg(figure, f"best {metric['name']} so far over trials of the search {search['name']}")


def _limits(values: Sequence[float], metric: Record) -> tuple[float, float]:
    """Leave the worst tenth, which may be worse by orders of magnitude, to the edge."""
    low, high = min(values), max(values)
    if sign_of(metric) > 0:
        low = float(np.quantile(values, 0.1))
    else:
        high = float(np.quantile(values, 0.9))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def course_panels(groups: Mapping[str, Sequence[Record]]) -> dict[str, str]:
    """Draw SGRC in the course of attacks: a thin line each, a strong one for the attack with the lowest end.

    Args:
        groups: entries of the summary's ``attacks`` by title.

    Returns:
        SVG by title, followed by the strong line's attack; groups without a course are left out.
    """
    courses = {title: [(a["attack"], _course(a)) for a in attacks] for title, attacks in groups.items()}
    courses = {title: [each for each in found if len(each[1])] for title, found in courses.items()}
    values = [float(value) for found in courses.values() for _, course in found for value in course[:, 1]]
    if not values:
        return {}
    margin = 0.06 * (max(values) - min(values)) or 1.0
    limits = min(*values, 0.0) - margin, max(*values, 0.0) + margin
    panels = {}
    for title, found in courses.items():
        if found:
            weakest = min(found, key=lambda each: (each[1][-1, 1], each[0]))
            caption = f"{title}; strong line: {shorten(weakest[0])}"
            panels[caption] = _course_panel(title, [course for _, course in found], weakest[1], limits)
    return panels


def _course(attack: Record) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return rows [points, 2] of an attack's part done, in percent, and SGRC."""
    rows = attack.get("horizons") or []
    last = rows[-1]["step"] if rows else 0
    known = [(100 * row["step"] / last, row["sgrc"]) for row in rows if row["sgrc"] is not None and last]
    return np.array(known, float).reshape(-1, 2)


def _course_panel(title: str, courses: Sequence[object], weakest: object, limits: tuple[float, float]) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.1))
        axes = figure.add_axes((0.13, 0.19, 0.84, 0.74))
        axes.axhline(0, color=COLOURS["line"], linewidth=1)
        for course in courses:
            x, y = np.asarray(course).T
            axes.plot(x, y, color=COLOURS["ink"], alpha=0.3, linewidth=0.8, marker=".", markersize=2.5)
        x, y = np.asarray(weakest).T
        axes.plot(x, y, color=COLOURS["protected"], linewidth=2, marker="o", markersize=3)
        axes.set_ylim(limits)
        axes.grid(visible=True, axis="y")
        axes.set_xlabel("part of the attack's steps (%)")
        return svg(figure, f"SGRC in the course of attacks, {title}")


def decay_plot(groups: Sequence[Record]) -> str | None:
    """Draw SGRC over the length of attacks that are alike but for that.

    Args:
        groups: the summary's ``decay``.

    Returns:
        SVG, a line for each group with the name that its attacks begin with; None without a value.
    """
    lines = []
    for group in groups:
        known = [(s, v) for s, v in zip(group["steps"], group["sgrc"], strict=True) if v is not None]
        if known:
            lines.append((_common(group["attacks"]), np.array(known, float)))
    if not lines:
        return None
    values = np.concatenate([line[:, 1] for _, line in lines])
    margin = 0.06 * float(np.ptp(values)) or 1.0
    limits = min(float(values.min()), 0.0) - margin, max(float(values.max()), 0.0) + margin
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, max(2.6, 0.17 * len(lines) + 0.7)))
        axes = figure.add_axes((0.06, 0.15, 0.64, 0.82))
        axes.set_ylim(limits)
        axes.set_xscale("log")
        axes.axhline(0, color=COLOURS["line"], linewidth=1)
        labels, ends = {}, {}
        for index, ((name, line), hue) in enumerate(zip(lines, itertools.cycle(HUES), strict=False)):
            axes.plot(line[:, 0], line[:, 1], color=COLOURS[hue], marker="o", markersize=3.5, linewidth=1.5)
            labels[str(index)], ends[str(index)] = (name, COLOURS[hue]), float(line[-1, 1])
        _end_labels(axes, ends, labels, limits, 0.14 / (0.82 * figure.get_figheight()))
        ticks = sorted({float(step) for _, line in lines for step in line[:, 0]})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=True, axis="y")
        axes.set_xlabel("fine-tuning steps of the whole attack")
        return svg(figure, "SGRC at the end of attacks that differ only in length")


def _common(names: Sequence[str]) -> str:
    """Return what the names begin with, or the first one."""
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return shorten("".join(letters[0] for letters in alike).rstrip("_-. ") or names[0])


def _end_labels(
    axes: matplotlib.axes.Axes,
    ends: Mapping[str, float],
    labels: Mapping[str, tuple[str, str]],
    limits: tuple[float, float],
    gap: float = 0.08,
) -> None:
    """Write each line's text in its colour beside its end, labels at least ``gap`` of the axis apart."""
    if not ends:
        return
    for key, height in spread(ends, gap * (limits[1] - limits[0]), limits).items():
        text, colour = labels[key]
        axes.text(1.02, height, text, color=colour, transform=axes.get_yaxis_transform(), va="center")
