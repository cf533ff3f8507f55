"""Gather the audits of this experiment into results.json, table.md and families.svg.

    python experiments/cifar10_audit/collect.py [runs/standard]

Reads <folder>/<checkpoint>/audit.json, of those that are done, and writes beside this file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.append(str(Path(__file__).parents[1]))
from audited import brief, tested, write_results

HERE = Path(__file__).parent
CHECKPOINTS = ("paper", "sampled", "unchanged", "times_1000")
COLOURS = {"scratch": "#888888", "unprotected": "#d55e00", "paper": "#cc79a7", "sampled": "#0072b2"} | {
    "unchanged": "#e69f00",
    "times_1000": "#009e73",
}


def gather(folder: Path) -> dict[str, Any]:
    """Return by checkpoint what its audit found, and every test value by attack and role."""
    found = {}
    for name in CHECKPOINTS:
        if not (folder / name / "audit.json").exists():
            continue
        audit = json.loads((folder / name / "audit.json").read_text())
        found[name] = {
            **{key: audit[key] for key in ("verdict", "intactness", "families", "decay", "controls", "seconds_total")},
            "worst_case": {key: group and brief(group) for key, group in audit["worst_case"].items()},
            "benign_worst_harm": (audit["benign"] or {}).get("worst_harm"),
            "attempts": audit["attempts"],
            "attacks": tested(audit),
        }
        found[name]["families"] = {key: brief(group) for key, group in audit["families"].items()}
    return found


def table(found: dict[str, Any]) -> str:
    """Return the Markdown table: for each family and checkpoint the best attack's test accuracy, and the gap closed."""
    first = next(iter(found.values()))
    lines = ["| family | scratch | unprotected | " + " | ".join(found) + " |", "|---|" + "---|" * (2 + len(found))]
    rows = {name: name.replace("_", " ") for name in first["families"]}
    for family, label in rows.items():
        lines.append(_row(label, [each["families"][family] for each in found.values()]))
    lines.append(_row("**all attacks**", [each["worst_case"]["overall"] for each in found.values()]))
    kept = [f"{each['intactness']['after']:.1f}" for each in found.values()]
    lines.append(f"| *original domain* | - | {first['intactness']['before']:.1f} | " + " | ".join(kept) + " |")
    return "\n".join(lines) + "\n"


def _row(label: str, groups: list[dict[str, Any]]) -> str:
    controls = [f"{groups[0]['roles'][role]['mean']:.1f}" for role in ("scratch", "unprotected")]
    cells = []
    for group in groups:
        gap = group["gap_closed"]["value"]
        cells.append(f"{group['roles']['protected']['mean']:.1f}" + ("" if gap is None else f" ({gap:.2f})"))
    return f"| {label} | " + " | ".join(controls + cells) + " |"


def figure(found: dict[str, Any], path: Path) -> None:
    """Draw each family's best attack against every model, one row a family."""
    first = next(iter(found.values()))["families"]
    families = list(first)
    drawing = Figure(figsize=(7.5, 0.36 * len(families) + 1.3), layout="constrained")
    axes = drawing.subplots()
    for role in ("scratch", "unprotected"):
        values = [first[family]["roles"][role]["mean"] for family in families]
        axes.plot(values, range(len(families)), "|", color=COLOURS[role], label=role, markersize=14, markeredgewidth=3)
    for name in found:
        values = [found[name]["families"][family]["roles"]["protected"]["mean"] for family in families]
        axes.plot(values, range(len(families)), "o", color=COLOURS[name], label=name, markersize=6, alpha=0.8)
    axes.set_yticks(range(len(families)), [family.replace("_", " ") for family in families])
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("restricted-domain test accuracy after the family's best attack (%)")
    axes.grid(axis="x", alpha=0.3)
    drawing.legend(loc="outside upper center", ncols=6, frameon=False, fontsize=8)
    drawing.savefig(path, metadata={"Date": None})


def main() -> None:
    found = gather(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/standard"))
    write_results(HERE / "results.json", {"checkpoints": found})
    (HERE / "table.md").write_text(table(found))
    figure(found, HERE / "families.svg")
    print(table(found))


if __name__ == "__main__":
    main()
