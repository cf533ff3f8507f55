"""Figures of results, of curves and of searches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from sophon.auditing.attack_scores import Attack
from sophon.auditing.scores import Score, align, wide
from sophon.auditing.table import Attempts
from sophon.auditing.words import in_order
from sophon.held_out import EXPOSURE_WORDS, EXPOSURES
from sophon.report.drawing import COLOURS, MARKERS, STYLE, dashes, label_ends, own, shorten, svg
from sophon.tasks import Metric


def band(points: pd.DataFrame) -> pd.DataFrame:
    """Return the ``mean`` of curves (rows of `Attempts.curves`) by step, and the ``low`` and ``high`` ends of them."""
    curves = align(wide(points))
    return pd.DataFrame({"mean": curves.mean(axis=1), "low": curves.min(axis=1), "high": curves.max(axis=1)})


def curve_panels(attempts: Attempts, names: Iterable[str], metric: Metric) -> dict[str, str]:
    """Draw one panel an attack: ``select`` over steps, every role with a band over its seeds, all on the same y-axis.

    Args:
        names: the attacks on the restricted domain to draw, in this order; those without a finite curve are left out.

    Returns:
        SVG by attack.
    """
    kept = attempts.table.loc[~attempts.table["diverged"] & (attempts.table["domain"] == "restricted"), "id"]
    curves = attempts.curves[attempts.curves["id"].isin(kept)]
    bands = {}
    for name in names:
        points = curves[curves["attack"] == name]
        roles = {role: band(points[points["role"] == role]) for role in in_order(points["role"])}
        if roles := {role: curve for role, curve in roles.items() if len(curve)}:
            bands[name] = roles
    limits = _limits([curve for roles in bands.values() for curve in roles.values()], metric)
    return {name: _panel(name, roles, limits, metric) for name, roles in bands.items()}


def _limits(bands: Sequence[pd.DataFrame], metric: Metric) -> tuple[float, float]:
    if not bands:
        return 0.0, 1.0
    points = pd.concat(bands)
    low, high = float(points["low"].min()), float(points["high"].max())
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    least, most = metric.limits
    return max(low - margin, least), min(high + margin, most + 2)


def _panel(name: str, bands: Mapping[str, pd.DataFrame], limits: tuple[float, float], metric: Metric) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.5, 2.1))
        axes = figure.add_axes((0.13, 0.19, 0.62, 0.74))
        axes.set_ylim(limits)
        axes.grid(visible=True, axis="y")
        for role, curve in bands.items():
            colour, steps = COLOURS[own(role)], curve.index.to_numpy(float)
            mean = curve["mean"].to_numpy()
            axes.plot(steps, mean, color=colour, linestyle=dashes(role), marker="o", markersize=2.2, linewidth=1.5)
            axes.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.2, linewidth=0)
        label_ends(axes, {role: float(curve["mean"].iloc[-1]) for role, curve in bands.items()}, limits)
        axes.set_xlabel("fine-tuning steps")
        return svg(figure, f"{metric.name} on the select split over fine-tuning steps, {name}")


def search_panels(trials: pd.DataFrame, metric: Metric) -> dict[str, str]:
    """Draw, for each search, every role's best value so far against the trials drawn, and the trials themselves.

    Args:
        trials: what `sophon.auditing.table.trials_table` returned.

    Returns:
        SVG by the search's name; searches without a finite value are left out.
    """
    valued = trials[trials["value"].notna()]
    return {str(name): _search_panel(str(name), of_search, metric) for name, of_search in valued.groupby("search")}


def _search_panel(name: str, trials: pd.DataFrame, metric: Metric) -> str:
    # the worst tenth, which may be worse by orders of magnitude, lies at the edge
    low = float(trials["value"].quantile(0.1 if metric.higher_is_better else 0.0))
    high = float(trials["value"].quantile(1.0 if metric.higher_is_better else 0.9))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    low, high = low - margin, high + margin
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.5))
        axes = figure.add_axes((0.1, 0.16, 0.7, 0.79))
        axes.set_ylim(low, high)
        for role in in_order(trials["role"]):
            rows = trials[trials["role"] == role]
            for pruned, shown in rows.groupby(rows["state"] == "pruned"):
                axes.plot(
                    shown["trial"] + 1,
                    shown["value"].clip(low, high),
                    color=COLOURS[own(role)],
                    linestyle="",
                    alpha=0.55,
                    clip_on=False,
                    marker="x" if pruned else MARKERS[own(role)],
                    markersize=3.2 if pruned else 2.4,
                )
            axes.step(rows["trial"] + 1, rows["best"], where="post", color=COLOURS[own(role)], linewidth=1.6)
        ends = trials.groupby("role")["best"].last().dropna()
        label_ends(axes, {str(role): float(best) for role, best in ends.items()}, (low, high))
        axes.set_xlim(0.5, trials["trial"].max() + 1.5)
        axes.locator_params(axis="x", integer=True)
        axes.grid(visible=True, axis="y")
        axes.set_xlabel("trials")
        return svg(figure, f"best {metric.name} so far over trials of the search {name}")


# A heading, or what a line is called with its scores by series.
Line = str | tuple[str, Mapping[str, Score]]


def dot_plot(attacks: Sequence[Attack], metric: Metric) -> str:
    """Draw the final test metric of every attack and role, with intervals, grouped by exposure, as SVG."""
    lines: list[Line] = []
    for exposure in EXPOSURES:
        group = [(attack.attack, attack.roles) for attack in attacks if attack.exposure == exposure]
        lines += [EXPOSURE_WORDS[exposure], *group] if group else []
    roles = in_order({role for attack in attacks for role in attack.roles})[::-1]
    series = {role: (COLOURS[own(role)], MARKERS[own(role)]) for role in roles}
    return dots(lines, series, metric, "after every attack, by role")


def dots(
    lines: Sequence[Line], series: Mapping[str, tuple[str, str]], metric: Metric, what: str, apart: float = 0.0
) -> str:
    """Draw lines of dots with 95 % intervals, as SVG.

    Args:
        lines: from top to bottom; a score is absent or without a mean where there is no dot.
        series: colour and marker of each, drawn in this order.
        apart: how far below the one before it each series is drawn, in lines.
    """
    labels = [line if isinstance(line, str) else shorten(line[0]) for line in lines]
    height = 0.6 + (0.24 + 0.4 * apart * len(series)) * len(lines)
    left = 0.25 + 0.066 * max(map(len, labels), default=0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, height))
        axes = figure.add_axes((left / 8.4, 0.5 / height, 0.98 - left / 8.4, 1 - 0.6 / height))
        axes.margins(x=0.03)
        for at, line in enumerate(lines):
            scores = {} if isinstance(line, str) else line[1]
            for index, (name, (colour, marker)) in enumerate(series.items()):
                if name in scores and scores[name].seeds:
                    mean, low, high = scores[name].mean, scores[name].low, scores[name].high
                    place = at + apart * (index - (len(series) - 1) / 2)
                    axes.plot(mean, place, marker, color=colour, markersize=4.5)
                    axes.plot([low, high], [place, place], color=colour, linewidth=1.2)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_yticks(range(len(lines)), labels)
        for label, line in zip(axes.get_yticklabels(), lines, strict=True):
            label.set_fontweight("bold" if isinstance(line, str) else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{metric.name} on the test split" + (f" ({metric.unit})" if metric.unit else ""))
        return svg(figure, f"{metric.name} on the test split {what}")
