"""Write the bench's table and its figure: what attacks get, and the gap closed by kind of attack, against the budget.

    python experiments/bench_f/summary.py runs/bench_f --row pool_anchored --then undoing --beside undoing_first

A row of ``--then`` went on from the first one's exports at its largest budget, which is added to its own.
One ``--beside`` them started from the reference; it has columns of its own in the table.
Gap closed of an attack is (U - P) / (U - S), of means over seeds, held to 0 .. 1, where 1 is no better than scratch;
a kind's is the mean over its attacks. Attacks with U - S below two points tell nothing and are left out there. The
benign domain's kind reads the other way: what of its head start harmless fine-tuning loses.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from sophon.report.drawing import COLOURS, HUES, STYLE, standalone, svg

HERE = Path(__file__).parent
ATTACKS = OmegaConf.load(HERE.parents[1] / "conf" / "attack" / "quickstart_strong.yaml")
# known to get far where protection lives in the last blocks
KNOWING = (
    "reinitialise_last_1",
    "reinitialise_last_2",
    "shrink_perturb_5e-1",
    "frozen_statistics",
    "distil_attack_200",
)
LOST = "original domain, points lost"


def kind(attack: str, exposure: str) -> str:
    """Return which line of the figure an attack belongs to."""
    if attack in KNOWING:
        return "knowing"
    return "searched" if attack == "tpe_search" else exposure.replace("_", " ")


def attempts(folder: Path, role: str) -> pd.DataFrame:
    """Return the mean test value of each attack against a role, with its kind; benign fine-tuning is one of them."""
    table = pd.read_parquet(folder / "attempts.parquet").query("role == @role")
    steps = {name: each.get("steps") for name, each in ATTACKS.strategies.items()}
    table = table[[steps.get(attack) != 0 for attack in table.attack]]
    benign = table.domain == "benign"
    kinds = map(kind, table.attack, table.exposure)
    table = table.assign(
        kind=["benign" if here else found for here, found in zip(benign, kinds, strict=True)],
        attack=table.attack.where(~benign, "benign, " + table.attack),
    )
    return table.groupby("attack").agg(kind=("kind", "first"), test=("test", "mean"))


def audited(runs: Path, rows: list[str]) -> list[tuple[float, Path]]:
    """Return the core-minutes since the reference, and the folder, of each audit of rows that follow one another."""
    found: list[tuple[float, Path]] = []
    for row in rows:
        begun = max((minutes for minutes, _ in found), default=0.0)
        folders = [file.parents[1] for file in sorted((runs / row).glob("seed*/*min/audit/attempts.parquet"))]
        found += [(begun + float(folder.name.removesuffix("min")), folder) for folder in folders]
    return found


def markdown(table: pd.DataFrame) -> str:
    """Return a table of text and numbers as Markdown."""
    head = [table.index.name, *table.columns]
    rows = [head, ["---"] * len(head), *table.reset_index().values.tolist()]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def draw(gaps: pd.DataFrame, lost: pd.Series, change: float | None, file: Path) -> None:
    """Draw the gap closed by kind over the points that the original domain loses, both against the budget.

    A dotted line marks the budget, if any, at which the second row took over.
    """
    minutes = [float(budget.split()[0]) for budget in gaps.columns]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        for hue, (name, row) in zip(HUES, gaps.iterrows(), strict=False):
            label, line = ("benign (harm)", "--") if name == "benign" else (name, "-")
            above.plot(minutes, row, line, color=COLOURS[hue], marker="o", label=label)
        if change is not None:
            above.axvline(change, color=COLOURS["line"], linestyle=":")
        above.set(xscale="log", ylabel="gap closed", ylim=(-0.03, 1.05))
        below.plot(minutes, lost, color=COLOURS["ink"], marker="o")
        below.axhline(0, color=COLOURS["line"], linewidth=0.5)
        below.set(xlabel="defender's budget, core-minutes", ylabel="original domain,\npoints lost")
        below.set_xticks(minutes, [f"{each:g}" for each in minutes])
        below.minorticks_off()
        for axes in (above, below):
            axes.grid(visible=True, axis="y")
        figure.legend(loc="outside right upper", frameon=False)
        file.write_text(standalone(svg(figure, "gap closed and points lost against the defender's budget")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, help="the bench's folder")
    parser.add_argument("--row", default="pool_anchored", help="name of the runs")
    parser.add_argument("--then", help="name of the runs that started from what those came to")
    parser.add_argument("--beside", help="name of runs to compare with")
    options = parser.parse_args()
    columns = {role: attempts(options.runs / "controls", role).test for role in ("scratch", "unprotected")}
    cells: dict[str, list[pd.DataFrame]] = {}
    losses: dict[str, list[float]] = {}
    lines = []
    before = None
    found = audited(options.runs, [row for row in (options.row, options.then) if row])
    beside = audited(options.runs, [options.beside]) if options.beside else []
    for minutes, folder in [*sorted(found), *sorted(beside)]:
        row = folder.parts[-3]
        budget = f"{minutes:g} min, {row}" if row == options.beside else f"{minutes:g} min"
        cells.setdefault(budget, []).append(attempts(folder / "audit", "protected"))
        manifest = json.loads((folder / "export" / "sophon.json").read_text())
        history, intactness = manifest["history"], manifest["intactness"]
        before = intactness["before"]["test"] if before is None else before
        after = intactness["after"]["test"]
        losses.setdefault(budget, []).append(before - after)
        lines.append(
            f"- {row}, {folder.parts[-2]}, {minutes:g} core-minutes: {history['rounds']} rounds in this run, "
            f"{history['rollbacks']} roll-backs, original domain (test) {after:.1f} (reference {before:.1f})"
        )
    for budget, tables in cells.items():
        columns[budget] = pd.concat([each.test for each in tables], axis=1).mean(axis=1)
    budgets = list(cells)
    table = pd.DataFrame(columns).dropna(subset=budgets)
    table.insert(0, "kind", next(iter(cells.values()))[0].kind)
    table = table.sort_values("kind", kind="stable").round(1)
    telling = table[table.unprotected - table.scratch >= 2]
    closed = telling[budgets].rsub(telling.unprotected, axis=0).div(telling.unprotected - telling.scratch, axis=0)
    gaps = closed.clip(0, 1).groupby(telling.kind).mean().round(2)
    lost = pd.Series({budget: sum(each) / len(each) for budget, each in losses.items()}).round(1)
    seeds = "; ".join(f"{budget}: {len(tables)}" for budget, tables in cells.items())
    head = f"Test accuracy in percent; protection seeds a column: {seeds}."
    summary = pd.concat([gaps, lost.to_frame(LOST).T]).rename_axis("kind")
    parts = [head, markdown(table), "Gap closed:", markdown(summary), "\n".join(lines)]
    (HERE / f"{options.row}.md").write_text("\n\n".join(parts) + "\n")
    change = max((m for m, folder in found if folder.parts[-3] == options.row)) if options.then else None
    drawn = [budget for budget in budgets if budget.endswith("min")]
    draw(gaps[drawn], lost[drawn], change, HERE / f"{options.row}.svg")


if __name__ == "__main__":
    main()
