"""The figure of a bench: protection against what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

# Wong's colours without yellow, which is hard to see on white; a marker sets apart what shares one.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_LOOKS = [(colour, marker) for marker, colour in product("osD^", _COLOURS)]
# what the guards of bench_c and bench_d allow
_TOLERANCES = {"points": 1.0, "percent": 5.0}


def draw(drawn: Mapping[str, Sequence[tuple[float, float]]], path: Path, unit: str) -> None:
    """Write an SVG: for each method the mean over its seeds, and each seed as a small dot.

    Args:
        drawn: by method, in the legend's order: intactness loss and worst-case gap closed, of each seed.
        path: the file.
        unit: of the loss: ``points`` of accuracy or ``percent`` of an error.
    """
    drawing = Figure(figsize=(8.0, 4.4), layout="constrained", facecolor="white")
    axes = drawing.subplots()
    axes.axhline(0, color="#888888", linewidth=1)
    axes.axhline(1, color="#888888", linewidth=1, linestyle="--")
    axes.axvline(_TOLERANCES[unit], color="#888888", linewidth=1, linestyle=":")
    for index, (name, pairs) in enumerate(drawn.items()):
        colour, marker = _LOOKS[index % len(_LOOKS)]
        losses, gaps = [x for x, _ in pairs], [y for _, y in pairs]
        axes.plot(losses, gaps, ".", color=colour, alpha=0.4, markersize=6)
        label = f"{name} (n = {len(pairs)})"
        axes.plot(mean(losses), mean(gaps), marker, color=colour, markersize=9, label=label)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -0.1), max(high, 1.1))
    axes.annotate("no better than scratch", (0.01, 1), xycoords=("axes fraction", "data"), fontsize=9, va="bottom")
    axes.annotate("no protection", (0.01, 0), xycoords=("axes fraction", "data"), fontsize=9, va="bottom")
    axes.set_xlabel(f"intactness loss on the original domain ({unit}); dotted: the guard's tolerance")
    axes.set_ylabel("worst-case gap closed")
    axes.grid(alpha=0.25)
    drawing.legend(loc="outside right upper", frameon=False, fontsize=9)
    drawing.savefig(path, metadata={"Date": None})
