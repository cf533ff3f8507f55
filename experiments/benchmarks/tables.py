"""The page that `inner_loop.py` makes of its results."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from methods import METHODS
from records import machines, markdown

MB = 1e6


def inner_loop_page(cells: Mapping[str, Any]) -> str:
    """Return the tables of all cells, by case, as Markdown."""
    measured = {name: cell for name, cell in cells.items() if "machine" in cell}
    parts = ["# Inner loop\n", "".join(f"Measured on {line}.\n" for line in machines(measured))]
    for case in dict.fromkeys(name.split("/")[1] for name in cells):
        own = {name: cell for name, cell in cells.items() if name.split("/")[1] == case}
        parts += [f"## {case}{_sizes(own)}\n", _times(own), _gradients(own), _memories(own), _left_out(own)]
    return "\n".join(part for part in parts if part)


def ratios(seconds: Mapping[str, list[float]], method: str) -> list[float]:
    """Return a method's time by its baseline's, turn by turn."""
    baseline = seconds[METHODS[method].baseline]
    return [own / other for own, other in zip(seconds[method], baseline, strict=True)]


def _sizes(cells: Mapping[str, Any]) -> str:
    job = next((cell["job"] for cell in cells.values() if "job" in cell), None)
    return f": {job['case']['adapt']} images a step, {job['case']['query']} a query" if job else ""


def _steps(name: str) -> int:
    return int(name.split("/")[2].removeprefix("K"))


def _times(cells: Mapping[str, Any]) -> str:
    rows = {_steps(name): cell["seconds"] for name, cell in cells.items() if "seconds" in cell}
    methods = [method for method, each in METHODS.items() if each.timed and any(method in row for row in rows.values())]
    if not methods:
        return ""
    body = [[str(steps), *(_time(rows[steps], method) for method in methods)] for steps in sorted(rows)]
    head = ["K", *(f"{method}, s" if METHODS[method].baseline == method else method for method in methods)]
    note = (
        "Time: seconds of the bounds, the others as multiples of theirs; median (lowest to highest), or the one turn.\n"
    )
    return f"{note}\n{markdown(head, body)}"


def _time(seconds: Mapping[str, list[float]], method: str) -> str:
    if method not in seconds:
        return "-"
    values = seconds[method] if METHODS[method].baseline == method else ratios(seconds, method)
    spread = f" ({min(values):.3g} to {max(values):.3g})" if len(values) > 1 else ""
    return f"{statistics.median(values):.3g}{spread}"


def _gradients(cells: Mapping[str, Any]) -> str:
    rows = {_steps(name): cell["approximations"] for name, cell in cells.items() if cell.get("approximations")}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not names:
        return ""
    body = [[str(steps), *(_distance(rows[steps].get(name)) for name in names)] for steps in sorted(rows)]
    note = "Gradients beside ours_first's: cosine, and (norm of the difference by its norm).\n\n"
    return note + markdown(["K", *names], body)


def _distance(values: Mapping[str, float] | None) -> str:
    return "-" if values is None else f"{values['cosine']:.3f} ({values['difference']:.3f})"


def _memories(cells: Mapping[str, Any]) -> str:
    found: dict[int, dict[str, Any]] = {}
    for name, cell in cells.items():
        if "peak" in cell:
            found.setdefault(_steps(name), {})[name.split("/")[3]] = cell
    methods = [method for method in METHODS if any(method in row for row in found.values())]
    if not methods:
        return ""
    body = [[str(steps), *(_memory(found[steps].get(method)) for method in methods)] for steps in sorted(found)]
    note = "Memory: MB at the peak above the loaded model, and (absolute).\n\n"
    return note + markdown(["K", *methods], body)


def _memory(cell: Mapping[str, Any] | None) -> str:
    return "-" if cell is None else f"{(cell['peak'] - cell['loaded']) / MB:.0f} ({cell['peak'] / MB:.0f})"


def _left_out(cells: Mapping[str, Any]) -> str:
    methods: dict[tuple[str, int, str], list[str]] = {}
    for name, cell in cells.items():
        for method, reason in cell["not_run"].items():
            methods.setdefault((name.split("/")[0], _steps(name), reason), []).append(method)
    return "".join(
        f"- {kind}, {', '.join(methods[kind, k, why])}, K {k}: not run: {why}\n" for kind, k, why in sorted(methods)
    )
