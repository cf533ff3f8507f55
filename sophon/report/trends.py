"""Figures of what changes: a search's best over its trials, SGRC over the length of attacks."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from sophon.audit.results import Decay
from sophon.audit.words import ROLES, known
from sophon.report.figures import COLOURS, HUES, MARKERS, STYLE, shorten, spread, svg
from sophon.tasks import Metric


def search_panels(trials: pd.DataFrame, metric: Metric) -> dict[str, str]:
    """Draw, for each search, every role's best value so far against the trials drawn, and the trials themselves.

    Args:
        trials: what `sophon.audit.table.trials_table` returned.
        metric: of the restricted domain.

    Returns:
        SVG by the search's name; searches without a finite value are left out.
    """
    valued = trials[trials["value"].notna()]
    return {str(name): _search_panel(str(name), mine, metric) for name, mine in valued.groupby("search")}


def _search_panel(name: str, trials: pd.DataFrame, metric: Metric) -> str:
    low, high = _limits(trials["value"], metric)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.1, 0.16, 0.7, 0.79))
        axes.set_ylim(low, high)
        ends = {}
        for role in ROLES:
            mine = trials[trials["role"] == role]
            for pruned, shown in mine.groupby(mine["state"] == "pruned"):
                axes.plot(
                    shown["trial"] + 1,
                    shown["value"].clip(low, high),
                    color=COLOURS[role],
                    linestyle="",
                    alpha=0.55,
                    clip_on=False,
                    marker="x" if pruned else MARKERS[role],
                    markersize=3.2 if pruned else 2.4,
                )
            axes.step(mine["trial"] + 1, mine["best"], where="post", color=COLOURS[role], linewidth=1.6)
            if len(mine) and np.isfinite(mine["best"].iloc[-1]):
                ends[role] = float(mine["best"].iloc[-1])
        _end_labels(axes, ends, {role: (role, COLOURS[role]) for role in ends}, (low, high))
        axes.set_xlim(0.5, trials["trial"].max() + 1.5)
        axes.grid(visible=True, axis="y")
        axes.set_xlabel("trials")
        return svg(figure, f"best {metric.name} so far over trials of the search {name}")


def _limits(values: pd.Series, metric: Metric) -> tuple[float, float]:
    """Leave the worst tenth, which may be worse by orders of magnitude, to the edge."""
    low = float(values.quantile(0.1) if metric.higher_is_better else values.min())
    high = float(values.max() if metric.higher_is_better else values.quantile(0.9))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return low - margin, high + margin


def decay_plot(groups: Sequence[Decay]) -> str | None:
    """Draw SGRC over the length of attacks that are alike but for that.

    Args:
        groups: of the audit's results.

    Returns:
        SVG, a line for each group with the name that its attacks begin with; None without a value.
    """
    lines = []
    for group in groups:
        points = [(s, v) for s, v in zip(group.steps, group.sgrc, strict=True) if known(v)]
        if points:
            lines.append((_common(group.attacks), np.array(points, float)))
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
