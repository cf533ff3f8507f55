"""Gather a bench into results.json, table.md and worst_case.svg.

    python experiments/strength/collect.py RUNS [--screen] [--also RESULTS] [--out DIR]

Reads what bench.py wrote. Attacks of up to ``--steps`` steps are the worst case and its families; longer ones are the
long horizon. A result of a seed is of one protection; intervals are over these.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rows import ROWS, read_rows
from scatter import draw

sys.path.append(str(Path(__file__).parents[1]))
from audited import brief, spread, tested, write_results

from sophon.audit.results import families, worst_case
from sophon.errors import UserError
from sophon.files import read_json, write_text

HERE = Path(__file__).parent
CONTROLS = ("unprotected", "scratch")
FAMILIES = ("search", "plain", "surgery", "lora", "partial")
Row = dict[str, Any]


def scored(audit: dict[str, Any], steps: int) -> Row:
    """Return what an audit found: the worst case, each family's, what was seen and held out, and the long attacks'."""
    metric = audit["metric"]
    short = [each for each in audit["attacks"] if each["strategy"]["steps"] <= steps]
    groups = {
        "worst_case": short,
        "long": [each for each in audit["attacks"] if each["strategy"]["steps"] > steps],
        **{f"exposure/{name}": [e for e in short if e["exposure"] == name] for name in ("seen", "longer", "held_out")},
        **{f"family/{name}": attacks for name, attacks in families(short).items()},
    }
    found = {name: worst_case(attacks, metric) for name, attacks in groups.items()}
    measured = (audit["masking"] or {}).get("measured")
    norm = measured and measured["weights"]["layers"]["norm"]["ratio"]
    return {
        "groups": {name: brief(group) for name, group in found.items() if group},
        "intactness": audit["intactness"],
        "benign_worst_harm": (audit["benign"] or {}).get("worst_harm"),
        "masked_share": (audit["masking"] or {}).get("share"),
        "norm_ratio": norm and norm["mean"],
        "attacks": tested(audit),
        "verdict": audit["verdict"],
    }


def gather(runs: Path, suite: str, steps: int) -> dict[str, Row]:
    """Return by method: its overrides and budget, and by seed what its protection cost and its audit found.

    Raises:
        UserError: there is no cell.
    """
    found: dict[str, Row] = {}
    for file in sorted(runs.glob("*/seed*/cell.json"), key=lambda path: (path.parts[-3], int(path.parts[-2][4:]))):
        cell = read_json(file)
        row = found.setdefault(cell["method"], {"overrides": cell["overrides"], **cell["budget"], "seeds": {}})
        seed = {"exit_code": cell["protect"]["exit_code"], "core_minutes": cell["protect"]["core_seconds"] / 60}
        if (file.parent / suite / "audit.json").exists():
            seed |= {"protected_with": cell["protect"]["machine"]}
            seed |= scored(read_json(file.parent / suite / "audit.json"), steps)
        row["seeds"][cell["seed"]] = seed
    if not found:
        raise UserError(f"{runs}: holds no cell; give the folder of a bench")
    return found


def with_earlier(found: dict[str, Row], earlier: Path) -> dict[str, Row]:
    """Add the seeds of an earlier results.json that a bench lacks: of the same yardstick, which is for who asks to see.

    Raises:
        UserError: a method has other overrides there.
    """
    for name, row in read_json(earlier)["methods"].items():
        mine = found.setdefault(name, {**row, "seeds": {}})
        if mine["overrides"] != row["overrides"]:
            raise UserError(f"--also: {earlier} has {name} with {row['overrides']}, the bench with {mine['overrides']}")
        both = {int(seed): each for seed, each in row["seeds"].items()} | mine["seeds"]
        mine["seeds"] = dict(sorted(both.items()))
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def gap(seed: Row, group: str) -> float | None:
    """Return the gap closed in a group of attacks, if a seed's audit has it."""
    value: float | None = seed.get("groups", {}).get(group, {}).get("gap_closed", {}).get("value")
    return value


def loss(seed: Row) -> float | None:
    """Return the intactness that a seed's protection cost: points of accuracy, or percent of the reference's error."""
    kept = seed.get("intactness") or {}
    lost: float | None = kept.get("loss")
    return lost if lost is None or _in_points(seed) else 100 * lost / kept["before"]


def _in_points(seed: Row) -> bool:
    return (seed.get("intactness") or {}).get("unit") == "%"


def _harm(seed: Row) -> float | None:
    harm = seed.get("benign_worst_harm") or {}
    # of an error, relative to what the reference gets
    found: float | None = harm.get("value" if _in_points(seed) else "sgrc")
    return found


def _group(name: str) -> Callable[[Row], float | None]:
    return lambda seed: gap(seed, name)


# by heading: what a seed has, and with how many digits it is written
COLUMNS: dict[str, tuple[Callable[[Row], float | None], int]] = {
    "intactness loss": (loss, 1),
    "**worst case**": (_group("worst_case"), 2),
    **{name: (_group(f"family/{name}"), 2) for name in FAMILIES},
    "held out": (_group("exposure/held_out"), 2),
    "long": (_group("long"), 2),
    "benign harm": (_harm, 1),
    "masked share": (lambda seed: seed.get("masked_share"), 2),
    "norm ratio": (lambda seed: seed.get("norm_ratio"), 2),
    "core-minutes": (lambda seed: seed["core_minutes"], 1),
}


def known(row: Row, value: Callable[[Row], float | None]) -> list[float]:
    """Return a column's value of every seed that has one."""
    return [found for seed in row["seeds"].values() if (found := value(seed)) is not None]


def _seeds(row: Row) -> str:
    """Say how many seeds were audited, and what became of others."""
    seeds = row["seeds"].values()
    audited = sum("groups" in seed for seed in seeds)
    refused = sum(seed["exit_code"] == 3 for seed in seeds)
    rest = {"without an acceptable checkpoint": refused, "unfinished": len(seeds) - audited - refused}
    return ", ".join([str(audited), *(f"{count} {what}" for what, count in rest.items() if count)])


def _line(name: str, row: Row) -> str:
    cells = []
    for value, digits in COLUMNS.values():
        found = known(row, value)
        fewer = f" (n = {len(found)})" if 0 < len(found) < len(row["seeds"]) else ""
        cells.append(spread(found, digits) + fewer if found else "-")
    return f"| {name} | " + " | ".join([*cells, _seeds(row)]) + " |"


def table(found: Mapping[str, Row], order: Mapping[str, Iterable[str]]) -> str:
    """Return Markdown: for each group of ``order`` a table of those of its rows that were run, then all other rows."""
    listed = {name for names in order.values() for name in names}
    groups = {**order, "others": [name for name in found if name not in listed]}
    head = ["| method | " + " | ".join(COLUMNS) + " | seeds |", "|---|" + "---|" * (len(COLUMNS) + 1)]
    parts = []
    for names in groups.values():
        lines = [_line(name, found[name]) for name in names if name in found]
        parts += ["\n".join([*head, *lines])] if lines else []
    return "\n\n".join([*parts, *_controls(found)]) + "\n"


def _unit(found: Mapping[str, Row]) -> str:
    audited = [seed for row in found.values() for seed in row["seeds"].values() if "groups" in seed]
    return "points" if all(map(_in_points, audited)) else "percent"


def _controls(found: Mapping[str, Row]) -> list[str]:
    """Say what units are, and the best against the models that no method changes; all audits share these attempts."""
    for row in found.values():
        for seed in row["seeds"].values():
            roles = seed.get("groups", {}).get("worst_case", {}).get("roles", {})
            if roles.keys() >= set(CONTROLS):
                digits, unit = (1, "points") if _in_points(seed) else (4, "percent of the error without protection")
                best = [f"{role} {roles[role]['mean']:.{digits}f} ({roles[role]['attack']})" for role in CONTROLS]
                return [f"Worst case without protection, test: {', '.join(best)}. Loss and harm in {unit}."]
    return []


def points(found: dict[str, Row], names: Sequence[str]) -> dict[str, list[tuple[float, float]]]:
    """Return by method the intactness loss and the worst-case gap closed of each seed that has both."""
    drawn = {}
    for name in (name for name in names if name in found):
        pairs = [(loss(seed), gap(seed, "worst_case")) for seed in found[name]["seeds"].values()]
        drawn[name] = [(x, y) for x, y in pairs if x is not None and y is not None]
    return {name: pairs for name, pairs in drawn.items() if pairs}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("--screen", action="store_true", help="gather the short audits")
    parser.add_argument("--also", type=Path, help="an earlier results.json, for seeds that RUNS lacks")
    parser.add_argument("--steps", type=int, default=200, help="of an attack that is not long")
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    try:
        order = read_rows(options.rows)
        found = gather(options.runs, "screen" if options.screen else "audit", options.steps)
        found = with_earlier(found, options.also) if options.also else found
    except UserError as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    write_results(options.out / "results.json", {"steps": options.steps, "methods": found})
    write_text(options.out / "table.md", table(found, order))
    drawn = points(found, [*order["methods"], *(name for name in found if name not in order["methods"])])
    shown = {name: pairs for name, pairs in drawn.items() if name not in order["ablations"]}
    if shown:
        best_first = dict(sorted(shown.items(), key=lambda item: -mean(y for _, y in item[1])))
        draw(best_first, options.out / "worst_case.svg", _unit(found))
    print(table(found, order))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
