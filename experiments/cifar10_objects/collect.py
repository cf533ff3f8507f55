"""Gather the audits of this experiment into results.json, table.md and recovery.svg.

    python experiments/cifar10_objects/collect.py [runs] [seeds ...]

Reads runs/<recipe>/seed<seed>/{protect/checkpoint/sophon.json,audit*/audit.json} and writes beside this file. Where
there are more than two attempts: their mean and the half width of its 95 % Student interval; else the values.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1]))
from audited import spread, write_results

HERE = Path(__file__).parent
RECIPES = {"paper": "cifar10_objects_paper", "sampled": "cifar10_objects"}
COLUMNS = ("scratch", "unprotected", "paper", "sampled")
COLOURS = {"scratch": "#888888", "unprotected": "#d55e00", "paper": "#cc79a7", "sampled": "#0072b2"}


def gather(runs: Path, seeds: list[int]) -> dict:
    """Return every test value by attack and column, with what each recipe cost the original domain."""
    attacks: dict[str, dict] = {}
    intactness: dict[str, list] = {recipe: [] for recipe in RECIPES}
    for recipe, folder in RECIPES.items():
        for seed in seeds:
            base = runs / folder / f"seed{seed}"
            audits = [json.loads(path.read_text()) for path in sorted(base.glob("audit*/audit.json"))]
            manifest = json.loads((base / "protect" / "checkpoint" / "sophon.json").read_text())
            kept = {split: manifest["intactness"][split] for split in ("before", "after")}
            intactness[recipe].append({"seed": seed, **kept, "history": manifest["history"]})
            for row in (row for audit in audits for row in audit["attacks"]):
                entry = attacks.setdefault(row["attack"], {"strategy": row["strategy"], "exposure": {}, "test": {}})
                entry["exposure"][recipe] = row["exposure"]
                for role, values in row["roles"].items():
                    # both recipes start from one reference: the audit of the first attacks it and scratch for both
                    column = recipe if role == "protected" else role
                    entry["test"].setdefault(column, []).extend(values["values"])
    return {"attacks": attacks, "intactness": intactness}


def table(results: dict) -> str:
    """Return the Markdown table: test accuracy in percent after each attack."""
    lines = ["| attack | " + " | ".join(COLUMNS) + " | seen by paper / sampled |", "|---|" + "---|" * 5]
    for name, entry in results["attacks"].items():
        cells = [spread(entry["test"][column]) if column in entry["test"] else "-" for column in COLUMNS]
        seen = " / ".join(entry["exposure"].get(recipe, "-").replace("_", " ") for recipe in RECIPES)
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seen} |")
    before = [run["before"]["test"] for run in results["intactness"]["sampled"]]
    after = {r: spread([run["after"]["test"] for run in results["intactness"][r]]) for r in RECIPES}
    lines.append(f"| *original domain* | - | {spread(before)} | {after['paper']} | {after['sampled']} | |")
    return "\n".join(lines) + "\n"


def figure(results: dict, path: Path) -> None:
    """Draw each attack's mean test accuracy against the four models, one row an attack."""
    attacks = {name: entry for name, entry in results["attacks"].items() if set(COLUMNS) <= set(entry["test"])}
    drawing = Figure(figsize=(7.5, 0.36 * len(attacks) + 1.3), layout="constrained")
    axes = drawing.subplots()
    for column in COLUMNS:
        for row, entry in enumerate(attacks.values()):
            values = entry["test"][column]
            axes.plot(values, [row] * len(values), ".", color=COLOURS[column], alpha=0.35, markersize=5)
        means = [statistics.mean(entry["test"][column]) for entry in attacks.values()]
        axes.plot(means, range(len(attacks)), "o", color=COLOURS[column], label=column, markersize=7)
    axes.set_yticks(range(len(attacks)), list(attacks))
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("restricted-domain test accuracy after the attack (%); small dots: single attempts")
    axes.grid(axis="x", alpha=0.3)
    drawing.legend(loc="outside upper center", ncols=len(COLUMNS), frameon=False)
    drawing.savefig(path, metadata={"Date": None})


def main() -> None:
    runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    seeds = [int(seed) for seed in sys.argv[2:]] or [0, 1]
    results = gather(runs, seeds)
    write_results(HERE / "results.json", {"seeds": seeds, **results})
    (HERE / "table.md").write_text(table(results))
    figure(results, HERE / "recovery.svg")
    print(table(results))


if __name__ == "__main__":
    main()
