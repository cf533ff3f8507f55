"""Figures as inline SVG that takes its colours and its font from the page around it.

The page must define a CSS variable for each of `COLOURS`, such as ``--protected``.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from importlib.resources import files
from itertools import pairwise
from typing import Any

import matplotlib.axes
from matplotlib.figure import Figure

from sophon.auditing.words import printable

# Drawn in these colours, which the SVG then replaces by CSS variables of the same name: one file serves light and dark.
COLOURS = {
    "protected": "#0072b2",
    "unprotected": "#d55e00",
    "filtered": "#009e73",
    "scratch": "#767676",
    "ink": "#010203",
    "line": "#040506",
    # of what has no colour of its own
    **{hue: f"#0{index}0809" for index, hue in enumerate(("ha", "hb", "hc", "hd", "he", "hf", "hg", "hh"))},
}
HUES = tuple(COLOURS)[-8:]
MARKERS = {"protected": "o", "unprotected": "s", "filtered": "^", "scratch": "D"}
_LONGEST_NAME = 40
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


def own(role: str) -> str:
    """Return the role whose colour and marker a role has: further filtered models have that of the first."""
    return role.partition("_")[0]


def dashes(role: str) -> Any:
    """Return a role's line style, in matplotlib's words."""
    return (0, (4, 2)) if role == "scratch" else (0, (1, 1.5)) if "_" in role else "-"


def label_ends(axes: matplotlib.axes.Axes, ends: Mapping[str, float], limits: tuple[float, float]) -> None:
    """Write each role in its colour beside the end of its line, moved apart where they would overlap."""
    gap = 0.1 * (limits[1] - limits[0])
    order = sorted(ends, key=lambda role: ends[role])
    placed = dict(ends)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + gap)
    if order:
        placed[order[-1]] = min(placed[order[-1]], limits[1])
    for above, below in pairwise(order[::-1]):
        placed[below] = min(placed[below], placed[above] - gap)
    for role, height in placed.items():
        axes.text(1.03, height, role, color=COLOURS[own(role)], transform=axes.get_yaxis_transform(), va="center")


def shorten(name: str) -> str:
    """Return a name that fits a label."""
    name = printable(name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}\N{HORIZONTAL ELLIPSIS}"


def svg(figure: Figure, description: str) -> str:
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


def standalone(drawing: str) -> str:
    """Return what `svg` returned as the text of a file, which brings the report's colours, light and dark."""
    colours = files("sophon.report").joinpath("templates/colours.css.j2").read_text()
    style = f"<style>{colours}svg {{ background: var(--page); font-family: sans-serif; }}</style>"
    return re.sub("(<svg )([^>]*>)", rf'\1xmlns="http://www.w3.org/2000/svg" \2\n{style}', drawing, count=1)


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
