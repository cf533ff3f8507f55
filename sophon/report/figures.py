"""Results and curves as inline SVG that takes its colours and its font from the page around it.

The page must define a CSS variable for each of `COLOURS`, such as ``--protected``.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from sophon.audit.results import Attack
from sophon.audit.scores import Score, align, wide
from sophon.audit.table import Attempts
from sophon.audit.words import EXPOSURE_WORDS, EXPOSURES, ROLES, printable
from sophon.tasks import Metric

# Drawn in these colours, which the SVG then replaces by CSS variables of the same name: one file serves light and dark.
COLOURS = {
    "protected": "#0072b2",
    "unprotected": "#d55e00",
    "scratch": "#767676",
    "ink": "#010203",
    "line": "#040506",
    # of what has no colour of its own: audits, groups of attacks
    **{hue: f"#0{index}0809" for index, hue in enumerate(("ha", "hb", "hc", "hd", "he", "hf", "hg", "hh"))},
}
HUES = tuple(COLOURS)[-8:]
_DASHES = {"protected": "-", "unprotected": "-", "scratch": (0, (4, 2))}
MARKERS = {"protected": "o", "unprotected": "s", "scratch": "D"}
_LONGEST_NAME = 40
_TALLEST = 8.7  # inches of lines that fit a sheet of paper
STYLE = {
    "svg.hashsalt": "sophon",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["line"],
    "ytick.color": COLOURS["line"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["line"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
}


def band(points: pd.DataFrame) -> pd.DataFrame:
    """Return the ``mean`` of curves (rows of `Attempts.curves`) by step, and half the width of its interval, ``half``.

    The interval is Student's over seeds; NaN of a single curve.
    """
    curves = align(wide(points))
    count = curves.shape[1]
    half = stats.t.ppf(0.975, count - 1) * curves.std(axis=1) / math.sqrt(count) if count > 1 else math.nan
    return pd.DataFrame({"mean": curves.mean(axis=1), "half": half})


def curve_panels(attempts: Attempts, names: Iterable[str], metric: Metric) -> dict[str, str]:
    """Draw one panel an attack: ``select`` over steps, every role with its confidence band, all on the same y-axis.

    Args:
        attempts: of the audit.
        names: the attacks on the restricted domain to draw, in this order; those without a finite curve are left out.
        metric: of the restricted domain.

    Returns:
        SVG by attack.
    """
    kept = attempts.table.loc[~attempts.table["diverged"] & (attempts.table["domain"] == "restricted"), "id"]
    curves = attempts.curves[attempts.curves["id"].isin(kept)]
    bands = {}
    for name in names:
        mine = curves[curves["attack"] == name]
        found = {role: band(mine[mine["role"] == role]) for role in ROLES}
        if found := {role: curve for role, curve in found.items() if len(curve)}:
            bands[name] = found
    limits = _limits([curve for found in bands.values() for curve in found.values()], metric)
    return {name: _panel(name, found, limits, metric) for name, found in bands.items()}


def _limits(bands: Sequence[pd.DataFrame], metric: Metric) -> tuple[float, float]:
    if not bands:
        return 0.0, 1.0
    every = pd.concat(bands)
    half = every["half"].fillna(0)
    low, high = float((every["mean"] - half).min()), float((every["mean"] + half).max())
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
            colour, steps = COLOURS[role], curve.index.to_numpy(float)
            mean, half = curve["mean"].to_numpy(), curve["half"].to_numpy()
            axes.plot(steps, mean, color=colour, linestyle=_DASHES[role], marker="o", markersize=2.2, linewidth=1.5)
            axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        ends = {role: float(curve["mean"].iloc[-1]) for role, curve in bands.items()}
        for role, height in spread(ends, 0.1 * (limits[1] - limits[0]), limits).items():
            axes.text(1.03, height, role, color=COLOURS[role], transform=axes.get_yaxis_transform(), va="center")
        axes.set_xlabel("fine-tuning steps")
        return svg(figure, f"{metric.name} on the select split over fine-tuning steps, {name}")


def spread(heights: Mapping[str, float], gap: float, limits: tuple[float, float]) -> dict[str, float]:
    """Move labels apart so that neighbours are at least ``gap`` apart and none lies above the limits."""
    order = sorted(heights, key=lambda role: heights[role])
    placed = dict(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    placed[order[-1]] = min(placed[order[-1]], limits[1])
    for above, below in pairwise(order[::-1]):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


# A heading, or what a line is called with its scores by series.
Line = str | tuple[str, Mapping[str, Score]]


def dot_plots(attacks: Sequence[Attack], metric: Metric) -> list[str]:
    """Draw the final test metric of every attack and role, with confidence intervals, grouped by exposure.

    Args:
        attacks: of the audit's results.
        metric: of the restricted domain.

    Returns:
        SVGs, each of what fits a sheet of paper, all with the same horizontal axis.
    """
    lines: list[Line] = []
    for exposure in EXPOSURES:
        group = [(attack.attack, attack.roles) for attack in attacks if attack.exposure == exposure]
        lines += [EXPOSURE_WORDS[exposure], *group] if group else []
    series = {role: (COLOURS[role], MARKERS[role]) for role in ROLES[::-1]}
    return dots(lines, series, metric, "after every attack, by role")


def dots(
    lines: Sequence[Line], series: Mapping[str, tuple[str, str]], metric: Metric, what: str, apart: float = 0.0
) -> list[str]:
    """Draw lines of dots with 95 % intervals.

    Args:
        lines: from top to bottom; a score is absent or without a mean where there is no dot.
        series: colour and marker of each, drawn in this order.
        metric: what is drawn.
        what: the rest of the description.
        apart: how far below the one before it each series is drawn, in lines.

    Returns:
        SVGs, each of what fits a sheet of paper, all with the same horizontal axis.
    """
    pitch = 0.24 + 0.4 * apart * len(series)
    count = max(1, math.ceil(len(lines) * pitch / _TALLEST))
    most = math.ceil(len(lines) / count)
    left = 0.25 + 0.066 * max((len(_label(line)) for line in lines), default=0)
    sheets: list[list[Line]] = []
    for line in lines:
        if not sheets or len(sheets[-1]) >= most - isinstance(line, str):
            sheets.append([])
        sheets[-1].append(line)
    scores = [score for line in lines if not isinstance(line, str) for score in line[1].values()]
    limits = _value_limits(scores, metric)
    return [
        _sheet(sheet, series, limits, metric, f"{what}, {number} of {len(sheets)}", (apart, pitch, left))
        for number, sheet in enumerate(sheets, 1)
    ]


def _value_limits(scores: Iterable[Score], metric: Metric) -> tuple[float, float]:
    edges = [edge for score in scores if score.seeds for edge in (_low(score), _high(score))] or [0.0, 1.0]
    margin = 0.03 * (max(edges) - min(edges)) or 1.0
    low, high = min(edges) - margin, max(edges) + margin
    return (max(low, -2.0), min(high, 102.0)) if metric.unit == "%" else (low, high)


def _low(score: Score) -> float:
    return score.mean if math.isnan(score.low) else score.low


def _high(score: Score) -> float:
    return score.mean if math.isnan(score.high) else score.high


def _sheet(
    lines: Sequence[Line],
    series: Mapping[str, tuple[str, str]],
    limits: tuple[float, float],
    metric: Metric,
    what: str,
    layout: tuple[float, float, float],
) -> str:
    apart, pitch, left = layout
    with matplotlib.rc_context(STYLE):
        height = 0.6 + pitch * len(lines)
        figure = Figure(figsize=(8.4, height))
        axes = figure.add_axes((left / 8.4, 0.5 / height, 0.98 - left / 8.4, 1 - 0.6 / height))
        for at, line in enumerate(lines):
            for index, (name, (colour, marker)) in enumerate(series.items()):
                score = None if isinstance(line, str) else line[1].get(name)
                if score and score.seeds:
                    axes.errorbar(
                        score.mean,
                        at + apart * (index - (len(series) - 1) / 2),
                        xerr=[[score.mean - _low(score)], [_high(score) - score.mean]],
                        fmt=marker,
                        color=colour,
                        markersize=4.5,
                        elinewidth=1.2,
                    )
        axes.set_xlim(limits)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.set_yticks(range(len(lines)), [_label(line) for line in lines])
        for label, line in zip(axes.get_yticklabels(), lines, strict=True):
            label.set_fontweight("bold" if isinstance(line, str) else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{metric.name} on the test split" + (f" ({metric.unit})" if metric.unit else ""))
        return svg(figure, f"{metric.name} on the test split {what}")


def _label(line: Line) -> str:
    return line if isinstance(line, str) else shorten(line[0])


def shorten(name: str) -> str:
    """Return a name that fits a label."""
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def svg(figure: Any, description: str) -> str:
    """Write a figure as an SVG element for HTML: no namespaces, ids of its own, colours from the page.

    Args:
        figure: drawn in `STYLE` with `COLOURS`.
        description: what it shows; no two figures of a page have the same.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A name may be in a script that the measuring font lacks; the browser has its own fonts.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    # Ids are unique within a page, which holds many figures. Only those of markers and clip paths are referred to.
    prefix = "f" + hashlib.sha256(description.encode(errors="replace")).hexdigest()[:8]
    for parent in list(root.iter()):
        for child in [child for child in parent if child.tag.endswith(("metadata", "style"))]:
            parent.remove(child)
        parent.tag = parent.tag.rpartition("}")[2]
        parent.tail = None
        parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
        _from_page(parent.attrib, prefix)
    # A size in points would override the page's layout; the viewBox keeps the proportions.
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": printable(description)}
    return ET.tostring(root, encoding="unicode")


def _from_page(attributes: dict[str, str], prefix: str) -> None:
    if "id" in attributes:
        attributes["id"] = prefix + attributes["id"]
    if "href" in attributes:
        attributes["href"] = attributes["href"].replace("#", f"#{prefix}")
    if "clip-path" in attributes:
        attributes["clip-path"] = attributes["clip-path"].replace("#", f"#{prefix}")
    if "style" in attributes:
        style = re.sub(r"font-family: [^;]*;? ?", "", attributes["style"])
        for name, colour in COLOURS.items():
            style = style.replace(colour, f"var(--{name})")
        attributes["style"] = style
