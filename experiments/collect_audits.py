"""Gather one experiment's audits over its seeds into results.json, table.md and samples.png.

    python experiments/collect_audits.py EXPERIMENT ATTACK,ATTACK SEED...

Reads runs/EXPERIMENT/seed<seed>/{protect/checkpoint/sophon.json,audit/}; writes to experiments/EXPERIMENT. The pictures
are those of the named attacks against the first seed's models.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from audited import write_results
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).parent
ROLES = ("scratch", "unprotected", "protected")


def gather(runs: Path, seeds: list[int]) -> dict:
    """Return by seed: intactness, the verdict, and every test value and further measurement by attack and role."""
    found = {}
    for seed in seeds:
        base = runs / f"seed{seed}"
        manifest = json.loads((base / "protect" / "checkpoint" / "sophon.json").read_text())
        audit = json.loads((base / "audit" / "audit.json").read_text())
        attacks = {
            row["attack"]: {
                "strategy": row["strategy"],
                "exposure": row["exposure"],
                "gap_closed": row["gap_closed"],
                "test": {role: scores["values"] for role, scores in row["roles"].items()},
                "details": {role: scores["details"] for role, scores in row["roles"].items()},
            }
            for row in audit["attacks"]
        }
        found[seed] = {
            "intactness": manifest["intactness"],
            "history": manifest["history"],
            "feature_network": audit["feature_network"],
            "seconds_of_attacks": audit["seconds_total"],
            "verdict": audit["verdict"],
            "attacks": attacks,
        }
    return found


def table(seeds: dict) -> str:
    """Return the Markdown table: for each attack and role the mean over the audit's seeds, for each run's seed."""
    first = next(iter(seeds.values()))
    lines = ["| attack | exposure | " + " | ".join(ROLES) + " |", "|---|---|" + "---|" * len(ROLES)]
    for name, attack in first["attacks"].items():
        cells = [
            ", ".join(f"{statistics.mean(run['attacks'][name]['test'][role]):.4f}" for run in seeds.values())
            for role in ROLES
        ]
        lines.append(f"| {name} | {attack['exposure'].replace('_', ' ')} | " + " | ".join(cells) + " |")
    kept = [
        ", ".join(f"{run['intactness'][when]['test']:.4f}" for run in seeds.values()) for when in ("before", "after")
    ]
    lines.append(f"| *original domain, no attack* | | - | {kept[0]} | {kept[1]} |")
    return "\n".join(lines) + "\n"


def pictures(audit: Path, names: list[str], path: Path) -> None:
    """Draw what each role's model generates at the points of each attack."""
    records = [json.loads(file.read_text()) for file in sorted((audit / "attempts").glob("*.json"))]
    shown = {(r["attack"], r["role"]): r["samples"] for r in records if r["samples"]}
    rows = [(name, role) for name in names for role in ROLES]
    columns = max(len(shown[row]) for row in rows)
    figure = Figure(figsize=(1.7 * columns + 1.2, 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes_of_row, (name, role) in zip(grid, rows, strict=True):
        for axes, sample in zip(axes_of_row, shown[name, role], strict=False):
            axes.imshow(Image.open(audit / sample["file"]), cmap="gray")
            axes.set_title(f"{sample['step']} steps", fontsize=7)
        axes_of_row[0].set_ylabel(f"{name}\n{role}", fontsize=7)
        for axes in axes_of_row:
            axes.set_xticks([])
            axes.set_yticks([])
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    name, attacks, *numbers = sys.argv[1:]
    seeds = [int(number) for number in numbers]
    out, runs = HERE / name, Path("runs") / name
    found = gather(runs, seeds)
    write_results(out / "results.json", {"seeds": found})
    (out / "table.md").write_text(table(found))
    pictures(runs / f"seed{seeds[0]}" / "audit", attacks.split(","), out / "samples.png")
    print(table(found))


if __name__ == "__main__":
    main()
