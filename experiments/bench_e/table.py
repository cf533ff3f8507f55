"""Gather the audits of bench.py: results.json, table.md, frontier.svg, all beside this file.

python experiments/bench_e/table.py runs/bench_e
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t as student

from sophon.auditing.results import results
from sophon.auditing.table import Attempts

HERE = Path(__file__).parent
# Passes of 64 images over the 4,000 of pre-training; those of simulated attackers are estimated from the sampler.
HALF = ("undo_04", "undo_06", "undo_07", "undo_08", "fresh_half", "distil_half", "own_initialisation", "sophon")
SHARE = {"unlearn": 0.1, "gradient_difference": 0.1, "coordinates": 0.2, **dict.fromkeys(HALF, 0.5)}
SHARE |= {"fresh_equal": 1.0, "undo_sophon": 1.0}
NAMES = {"filtered_2": "filtered, student"}


def attempts_of(audit: Path) -> Attempts:
    return Attempts(*(pd.read_parquet(audit / f"{name}.parquet") for name in ("attempts", "curves")))


def joined(*audits: Path) -> dict[str, Any]:
    """Return the worst case of all attacks in a model's audits: R in both readings, and each role's own best."""
    table, curves = (pd.concat(parts, ignore_index=True) for parts in zip(*map(attempts_of, audits), strict=True))
    worst = results(Attempts(table, curves)).worst_case["overall"]
    readings = {"own_best": worst.own_best, "same_attack": worst.same_attack}
    found: dict[str, Any] = {name: dataclasses.asdict(reading.removal) for name, reading in readings.items()}
    return found | {"best": {role: score.mean for role, score in worst.own_best.roles.items()}}


def row_of(audit: Path) -> dict[str, Any]:
    """Return one seed's figures of a row; accuracies in percent."""
    name = audit.name.removesuffix("_audit")
    intactness = json.loads((audit / "audit.json").read_text())["intactness"]
    made, knowing = audit.with_name(name), audit.with_name(f"{name}_knowing")
    row = {
        "seed": int(audit.parent.name.removeprefix("seed")),
        "row": name,
        "original": intactness["after"],
        "lost": intactness["loss"]["value"],
        **accuracies(audit, "protected"),
        "R": joined(audit),
        "core_seconds": json.loads((made / "protect.seconds.json").read_text())["core_seconds"],
    }
    if (knowing / "audit.json").exists():
        row |= {"knowing": joined(knowing), "all": joined(audit, knowing)}
    return row


def accuracies(audit: Path, role: str) -> dict[str, float]:
    """Return a model's accuracy in percent after the fine-tuning that its attacker chose, and by a linear probe."""
    table = attempts_of(audit).table
    mine = table[(table["role"] == role) & (table["domain"] == "restricted")].set_index("attack")
    tuned = mine.drop(index="linear_probe")
    return {
        "tuned": float(tuned.loc[tuned["select"].idxmax(), "test"]),
        "probe": float(mine.loc["linear_probe", "test"]),
    }


def controls_of(folder: Path) -> list[dict[str, Any]]:
    """Return the figures of the models that every row is compared with."""
    controls, seed = folder / "controls", int(folder.name.removeprefix("seed"))
    roles = ("unprotected", "filtered", "filtered_2", "scratch")
    return [{"seed": seed, "row": NAMES.get(role, role), **accuracies(controls, role)} for role in roles]


def several(values: list[float], digits: int = 1) -> str:
    """Say the mean, from three seeds on half the width of Student's 95 % interval, and each seed's value."""
    said = f"{mean(values):.{digits}f}"
    if len(values) > 2:
        said += f" ± {student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)):.{digits}f}"
    return said + (f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else "")


def seeds(rows: list[dict[str, Any]]) -> str:
    return ", ".join(str(row["seed"]) for row in rows)


def gap(rows: list[dict[str, Any]], key: str) -> list[str]:
    """Say R in both readings; of a single seed with its interval over the test images."""
    found = [[row[key][reading] for row in rows] for reading in ("own_best", "same_attack")]
    if len(rows) == 1:
        return [f"{only['value']:.2f} [{only['low']:.2f}, {only['high']:.2f}]" for (only,) in found]
    return [several([each["value"] for each in values], 2) for values in found]


def lines(head: list[str], body: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body]) + "\n"


def table(rows: list[dict[str, Any]], controls: list[dict[str, Any]]) -> str:
    """Write two tables: the first suite of attacks, and the rows that attackers who know attacked."""
    first, second = [], []
    for name in dict.fromkeys(each["row"] for each in controls):
        mine = [each for each in controls if each["row"] == name]
        figures = [several([each[key] for each in mine]) for key in ("tuned", "probe")]
        first.append([f"*{name}*", seeds(mine), "-", *figures, "-", "-", "-"])
    for name in [name for name in SHARE if any(each["row"] == name for each in rows)]:
        mine = [each for each in rows if each["row"] == name]
        figures = [several([each[key] for each in mine]) for key in ("lost", "tuned", "probe")]
        first.append([name, seeds(mine), *figures, *gap(mine, "R"), f"{SHARE[name]:.0%}"])
        known = [each for each in mine if "knowing" in each]
        if known:
            roles = ("unprotected", "filtered", "filtered_2", "protected")
            best = [several([each["knowing"]["best"][role] for each in known]) for role in roles]
            second.append([name, seeds(known), *best, *gap(known, "knowing"), *gap(known, "all")])
    readings = ["R, own best", "R, same attack"]
    head = ["model", "seeds", "lost", "best fine-tuning", "linear probe", *readings, "compute"]
    knowing = ["row", "seeds", "unprotected", "filtered", "filtered, student", "protected", *readings]
    every = ["all attacks: R, own best", "all attacks: R, same attack"]
    return lines(head, first) + "\n" + lines([*knowing, *every], second)


def frontier(rows: list[dict[str, Any]]) -> Figure:
    """Draw R, the lower of its two readings, of each seed and as their mean, against the loss and the price.

    What hinders steps has no place there: it removes nothing, whatever its R.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    marks = {"R": ("o", "#2a6f97", "plain attackers"), "knowing": ("^", "#c1121f", "attackers who know")}
    for name in [name for name in SHARE if name != "coordinates" and any(each["row"] == name for each in rows)]:
        for key, (mark, colour, label) in marks.items():
            mine = [each for each in rows if each["row"] == name and key in each]
            if not mine:
                continue
            values = [min(each[key][reading]["value"] for reading in ("own_best", "same_attack")) for each in mine]
            for axes, places in ((left, [each["lost"] for each in mine]), (right, [100 * SHARE[name]] * len(mine))):
                axes.plot(places, values, mark, color=colour, alpha=0.25, markersize=4)
                axes.plot(mean(places), mean(values), mark, color=colour, label=label)
                if key == "R":
                    axes.annotate(
                        name, (mean(places), mean(values)), xytext=(4, 3), textcoords="offset points", fontsize=7
                    )
    left.set(xlabel="lost on the original domain's test, points", ylabel="R (1: as filtered)")
    right.set(xlabel="share of pre-training compute, %")
    for axes in (left, right):
        axes.margins(x=0.2)
        axes.axhline(1, color="#999999", linewidth=0.8)
        axes.axhline(0, color="#999999", linewidth=0.8)
    handles, labels = left.get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    left.legend(legend.values(), legend.keys(), fontsize=7)
    return figure


def main() -> None:
    folders = sorted(found.parent.parent for found in Path(sys.argv[1]).glob("seed*/controls/audit.json"))
    rows = [row_of(found.parent) for folder in folders for found in sorted(folder.glob("*_audit/audit.json"))]
    controls = [row for folder in folders for row in controls_of(folder)]
    (HERE / "results.json").write_text(json.dumps({"controls": controls, "rows": rows}, indent=1) + "\n")
    (HERE / "table.md").write_text(table(rows, controls))
    frontier(rows).savefig(HERE / "frontier.svg")
    print(table(rows, controls))


if __name__ == "__main__":
    main()
