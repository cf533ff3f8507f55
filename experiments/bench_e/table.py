"""Gather the audits of bench.py: results.json, table.md, frontier.svg, all beside this file.

python experiments/bench_e/table.py runs/bench_e
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

HERE = Path(__file__).parent
# Passes of 64 images over the 4,000 of pre-training; those of simulated attackers are estimated from the sampler.
HALF = ("undo_04", "undo_06", "undo_07", "undo_08", "fresh_half", "own_initialisation", "sophon")
SHARE = {"unlearn": 0.1, "gradient_difference": 0.1, "coordinates": 0.2, **dict.fromkeys(HALF, 0.5)}
SHARE |= {"fresh_equal": 1.0, "undo_sophon": 1.0}


def row_of(audit: Path) -> dict[str, Any]:
    """Return one seed's figures of a row; accuracies in percent."""
    found, attempts = json.loads((audit / "audit.json").read_text()), pd.read_parquet(audit / "attempts.parquet")
    mine = attempts[(attempts["role"] == "protected") & (attempts["domain"] == "restricted")].set_index("attack")
    tuned, made = mine.drop(index="linear_probe"), audit.with_name(audit.name.removesuffix("_audit"))
    worst, intactness = found["worst_case"]["overall"], found["intactness"]
    return {
        "seed": int(audit.parent.name.removeprefix("seed")),
        "row": made.name,
        "original": intactness["after"],
        "lost": intactness["loss"]["value"],
        "tuned": float(tuned.loc[tuned["select"].idxmax(), "test"]),
        "probe": float(mine.loc["linear_probe", "test"]),
        "own_best": worst["own_best"]["removal"],
        "same_attack": worst["same_attack"]["removal"],
        "core_seconds": json.loads(
            (audit.with_name(audit.name.removesuffix("_audit")) / "protect.seconds.json").read_text()
        )["core_seconds"],
    }


def controls_of(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of the models that every row is compared with."""
    attempts = pd.read_parquet(folder / "controls" / "attempts.parquet")
    rows = []
    for role, mine in attempts[attempts["domain"] == "restricted"].groupby("role"):
        mine = mine.set_index("attack")
        tuned = mine.drop(index="linear_probe")
        best = float(tuned.loc[tuned["select"].idxmax(), "test"])
        name = {"filtered_2": "filtered, student"}.get(role, role)
        rows.append({"seed": int(folder.name.removeprefix("seed")), "row": name, "tuned": best})
        rows[-1]["probe"] = float(mine.loc["linear_probe", "test"])
    return rows


def gap(values: list[dict[str, Any]], seeds: int) -> str:
    """Say R: of one seed with its interval over the test images, of several as their mean and each."""
    if seeds == 1:
        return f"{values[0]['value']:.2f} [{values[0]['low']:.2f}, {values[0]['high']:.2f}]"
    found = [each["value"] for each in values]
    return f"{mean(found):.2f} ({', '.join(f'{value:.2f}' for value in found)})"


def several(values: list[float]) -> str:
    return f"{mean(values):.1f}" + (f" ({', '.join(f'{value:.1f}' for value in values)})" if len(values) > 1 else "")


def table(rows: list[dict[str, Any]], controls: list[dict[str, Any]]) -> str:
    lines = [
        "| model | original test | lost | best fine-tuning | linear probe | R, own best | R, same attack | compute |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(each["row"] for each in controls):
        mine = [each for each in controls if each["row"] == name]
        tuned, probe = ([each[key] for each in mine] for key in ("tuned", "probe"))
        lines.append(f"| *{name}* | - | - | {several(tuned)} | {several(probe)} | - | - | - |")
    for name in [name for name in SHARE if any(each["row"] == name for each in rows)]:
        mine = [each for each in rows if each["row"] == name]
        figures = [several([each[key] for each in mine]) for key in ("original", "lost", "tuned", "probe")]
        scores = [gap([each[key] for each in mine], len(mine)) for key in ("own_best", "same_attack")]
        lines.append(f"| {name} | {' | '.join(figures + scores)} | {SHARE[name]:.0%} |")
    return "\n".join(lines) + "\n"


def frontier(rows: list[dict[str, Any]]) -> Figure:
    """Draw R, the lower of its two readings, against what the original domain lost and against the price.

    What hinders steps has no place there: it removes nothing, whatever its R.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for each in (row for row in rows if row["row"] != "coordinates"):
        value = min(each["own_best"]["value"], each["same_attack"]["value"])
        for axes, place in ((left, each["lost"]), (right, 100 * SHARE[each["row"]])):
            axes.plot(place, value, "o", color="#2a6f97")
            axes.annotate(each["row"], (place, value), xytext=(4, 3), textcoords="offset points", fontsize=7)
    left.set(xlabel="lost on the original domain's test, points", ylabel="R (1: as filtered)")
    right.set(xlabel="share of pre-training compute, %")
    for axes in (left, right):
        axes.axhline(1, color="#999999", linewidth=0.8)
        axes.axhline(0, color="#999999", linewidth=0.8)
    return figure


def main() -> None:
    folders = sorted(Path(sys.argv[1]).glob("seed*"))
    rows = [row_of(found.parent) for folder in folders for found in sorted(folder.glob("*_audit/audit.json"))]
    controls = [row for folder in folders for row in controls_of(folder)]
    results = {"controls": controls, "rows": rows}
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows, controls))
    frontier(rows).savefig(HERE / "frontier.svg")
    print(table(rows, controls))


if __name__ == "__main__":
    main()
