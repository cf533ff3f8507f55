"""The report's figures as inline SVG that takes its colours and its font from the page around it.

The page must define the CSS variables ``--protected``, ``--unprotected``, ``--scratch``, ``--ink`` and ``--line``.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from sophon.audit.metrics import Array, ci95, points, resample, successful
from sophon.audit.verdict import EXPOSURES, ROLES, Record

# Drawn in these colours, which the SVG then replaces by CSS variables of the same name: one file serves light and dark.
_COLOURS = {
    "protected": "#0072b2",
    "unprotected": "#d55e00",
    "scratch": "#767676",
    "ink": "#010203",
    "line": "#040506",
}
_DASHES = {"protected": "-", "unprotected": "-", "scratch": (0, (4, 2))}
_MARKERS = {"protected": "o", "unprotected": "s", "scratch": "D"}
EXPOSURE_WORDS = {"seen": "seen", "longer": "longer", "held_out": "held out"}
_LONGEST_NAME = 40
_STYLE = {
    "svg.hashsalt": "sophon",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 8,
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _COLOURS["line"],
    "axes.labelcolor": _COLOURS["ink"],
    "text.color": _COLOURS["ink"],
    "xtick.color": _COLOURS["line"],
    "ytick.color": _COLOURS["line"],
    "xtick.labelcolor": _COLOURS["ink"],
    "ytick.labelcolor": _COLOURS["ink"],
    "grid.color": _COLOURS["line"],
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
}


def printable(text: str) -> str:
    """Return ``text`` with everything replaced that XML, a terminal or a table row cannot show."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def band(attempts: Iterable[Record]) -> tuple[Array, Array, Array]:
    """Return steps, mean and 95 % half width (NaN for one attempt) of the successful attempts' ``select`` curves."""
    steps, values = resample(points(attempt["curve"]) for attempt in successful(attempts))
    half = [ci95(list(column)) for column in values.T]
    return steps, values.mean(axis=0) if len(values) else np.empty(0), np.array(half, dtype=float)


def curve_panels(attempts: Sequence[Record], names: Iterable[str], metric: Record) -> dict[str, str]:
    """Draw one panel an attack: ``select`` over steps, every role with its confidence band, all on the same y-axis.

    Args:
        attempts: stored attempts.
        names: the attacks to draw, in this order; those without a finite curve are left out.
        metric: ``name`` and ``unit``.

    Returns:
        SVG by attack.
    """
    bands = {}
    for name in names:
        mine = [a for a in attempts if a["attack"] == name]
        found = {role: band(a for a in mine if a["role"] == role) for role in ROLES}
        if found := {role: curve for role, curve in found.items() if len(curve[0])}:
            bands[name] = found
    limits = _limits([curve for found in bands.values() for curve in found.values()], metric)
    return {name: _panel(name, found, limits, metric) for name, found in bands.items()}


def _limits(bands: Iterable[tuple[Array, Array, Array]], metric: Record) -> tuple[float, float]:
    edges = [edge for _, mean, half in bands for edge in (mean - np.nan_to_num(half), mean + np.nan_to_num(half))]
    if not edges:
        return 0.0, 1.0
    low, high = float(min(edge.min() for edge in edges)), float(max(edge.max() for edge in edges))
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    low, high = low - margin, high + margin
    return (max(low, 0.0), min(high, 102.0)) if metric["unit"] == "%" else (low, high)


def _panel(
    name: str, bands: Mapping[str, tuple[Array, Array, Array]], limits: tuple[float, float], metric: Record
) -> str:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.5, 2.1))
        axes = figure.add_axes((0.13, 0.19, 0.62, 0.74))
        axes.set_ylim(limits)
        axes.grid(visible=True, axis="y")
        for role, (steps, mean, half) in bands.items():
            colour = _COLOURS[role]
            axes.plot(steps, mean, color=colour, linestyle=_DASHES[role], marker="o", markersize=2.2, linewidth=1.5)
            axes.fill_between(steps, mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
        ends = {role: float(mean[-1]) for role, (_, mean, _) in bands.items()}
        for role, height in _spread(ends, 0.1 * (limits[1] - limits[0]), limits).items():
            axes.text(1.03, height, role, color=_COLOURS[role], transform=axes.get_yaxis_transform(), va="center")
        axes.set_xlabel("fine-tuning steps")
        return _svg(figure, f"{metric['name']} on the select split over fine-tuning steps, {name}")


def _spread(heights: Mapping[str, float], gap: float, limits: tuple[float, float]) -> dict[str, float]:
    """Move labels apart so that neighbours are at least ``gap`` apart and none lies above the limits."""
    order = sorted(heights, key=lambda role: heights[role])
    placed = dict(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    placed[order[-1]] = min(placed[order[-1]], limits[1])
    for above, below in pairwise(order[::-1]):
        placed[below] = min(placed[below], placed[above] - gap)
    return placed


def dot_plot(attacks: Sequence[Record], metric: Record) -> str:
    """Draw the final test metric of every attack and role, with confidence intervals, grouped by exposure.

    Args:
        attacks: the summary's ``attacks``.
        metric: ``name`` and ``unit``.

    Returns:
        SVG.
    """
    rows: list[Record | str] = []
    for exposure in EXPOSURES:
        group = [attack for attack in attacks if attack["exposure"] == exposure]
        rows += [EXPOSURE_WORDS[exposure], *group] if group else []
    labels = [row if isinstance(row, str) else _short(row["attack"]) for row in rows]
    with matplotlib.rc_context(_STYLE):
        height, left = 0.6 + 0.24 * len(rows), 0.25 + 0.066 * max(map(len, labels))
        figure = Figure(figsize=(8.4, height))
        axes = figure.add_axes((left / 8.4, 0.5 / height, 0.98 - left / 8.4, 1 - 0.6 / height))
        for at, row in enumerate(rows):
            if not isinstance(row, str):
                _dots(axes, at, row["roles"])
        if metric["unit"] == "%":  # the intervals of two or three seeds may reach far beyond what there is
            low, high = axes.get_xlim()
            axes.set_xlim(max(low, -2.0), min(high, 102.0))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), labels)
        for label, row in zip(axes.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if isinstance(row, str) else "normal")
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=True, axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{metric['name']} on the test split" + (f" ({metric['unit']})" if metric["unit"] else ""))
        return _svg(figure, f"{metric['name']} on the test split after every attack, by role")


def _dots(axes: Any, at: int, roles: Mapping[str, Record]) -> None:
    for role in ROLES[::-1]:
        score = roles.get(role)
        if not score or score["mean"] is None:
            continue
        style = {"fmt": _MARKERS[role], "color": _COLOURS[role], "markersize": 4.5, "elinewidth": 1.2}
        axes.errorbar(score["mean"], at, xerr=score["ci95"], **style)


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def _svg(figure: Any, description: str) -> str:
    """Write a figure as an SVG element for HTML: no namespaces, ids of its own, colours from the page."""
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
        for name, colour in _COLOURS.items():
            style = style.replace(colour, f"var(--{name})")
        attributes["style"] = style
