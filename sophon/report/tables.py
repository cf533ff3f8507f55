"""What an audit's summary says, as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sophon.audit.verdict import EXPOSURES, ROLES, Record, describe, printable
from sophon.report.document import Name, Table
from sophon.report.figures import EXPOSURE_WORDS

# Left to right from what the attacker has without us to what is left to it.
SHOWN_ROLES = ROLES[::-1]
OVERHEAD_LEVEL = "80"
FRECHET = "Frechet distance"
_PLAIN = {"unit": ""}


def name(text: str) -> Name:
    """Return what somebody called something, as a cell."""
    return Name(printable(text))


def metric_name(summary: Record) -> str:
    """Return what was measured, with its unit."""
    metric = summary["metric"]
    return f"{metric['name']} ({metric['unit']})" if metric["unit"] else f"{metric['name']}"


def number(value: float | None, metric: Record) -> str:
    """Write a value for a table, whose head or note has the unit."""
    if value is None:
        return "-"
    return f"{value:.1f}" if metric["unit"] == "%" else f"{value:.4g}"


def score(found: Record | None, metric: Record) -> str:
    """Write the mean over seeds with the half width of its interval, and how many attempts failed."""
    if not found:
        return "-"
    text = number(found["mean"], metric)
    if found.get("ci95") is not None:
        text += f" ± {number(found['ci95'], metric)}"
    return f"{text} ({found['failed']} failed)" if found.get("failed") else text


def gap(found: Record) -> str:
    """Write gap closed with its interval."""
    if found["value"] is None:
        return "-"
    return f"{found['value']:.2f}" + (" [{:.2f}, {:.2f}]".format(*found["ci95"]) if found["ci95"] else "")


def interval(found: Record, metric: Record) -> str:
    """Write a value with its bootstrap interval."""
    text = number(found["value"], metric)
    return text + (" [{}, {}]".format(*(number(end, metric) for end in found["ci95"])) if found["ci95"] else "")


def gap_lines(found: Record) -> str:
    """Write gap closed with its interval, or the reason why there is none, below it."""
    return gap(found).replace(" [", "\n[") + (f"\n{found['reason']}" if found["reason"] else "")


def percent(value: float | None) -> str:
    """Write SGRC."""
    return "-" if value is None else f"{value:.1f} %"


def exposure(attack: Record) -> str:
    """Say what protection knew of an attack, and in what the attack lies outside of that."""
    return printable(
        EXPOSURE_WORDS[attack["exposure"]] + (f": {', '.join(attack['outside'])}" if attack["outside"] else "")
    )


def _overhead(attack: Record) -> str:
    level = (attack["overhead"] or {}).get(OVERHEAD_LEVEL)
    if not level:
        return "-"
    steps = level["steps"]
    return f"> {steps['at_least']:.2g}" if steps["ratio"] is None else f"{steps['ratio']:.2g}"


def _deed(attack: Record) -> str:
    """Say what an attack does; of a search, whose winners differ by role, what the protected model suffers."""
    return printable("winner: " * bool(attack.get("search")) + describe(attack["strategy"]))


def short_table(summary: Record) -> Table:
    """Return what fits a terminal: attack, exposure, each role's mean test metric, and gap closed."""
    metric = summary["metric"]
    unit = f" ({metric['unit']})" if metric["unit"] else ""
    rows = [
        [
            name(attack["attack"]),
            exposure(attack),
            *(score(attack["roles"].get(role), metric) for role in SHOWN_ROLES),
            gap(attack["gap_closed"]),
        ]
        for attack in summary["attacks"]
    ]
    return Table(["attack", "exposure", *(f"{role}{unit}" for role in SHOWN_ROLES), "gap closed"], rows, 2)


def attacks_table(summary: Record) -> Table:
    """Return every attack with its scores; what it does stands small below its name."""
    metric = summary["metric"]
    rows = [
        [
            Name(f"{printable(attack['attack'])}\n{_deed(attack)}"),
            exposure(attack),
            *(score(attack["roles"].get(role), metric) for role in SHOWN_ROLES),
            gap_lines(attack["gap_closed"]),
            _overhead(attack),
            percent(attack["sgrc"]),
            number(attack["signed_area"], metric),
        ]
        for attack in summary["attacks"]
    ]
    head = ["attack", "exposure", *SHOWN_ROLES, "gap closed", f"steps to {OVERHEAD_LEVEL} % of scratch", "SGRC"]
    return Table([*head, "signed area"], rows, 2)


def worst_table(summary: Record) -> Table:
    """Return the worst cases: overall, by exposure, and by family; below each value the attack that reached it."""
    metric = summary["metric"]
    groups = {"all attacks": summary["worst_case"]["overall"]}
    groups |= {EXPOSURE_WORDS[each]: summary["worst_case"][each] for each in EXPOSURES}
    groups |= {f"family {printable(each)}": found for each, found in (summary.get("families") or {}).items()}

    def best(group: Record, role: str) -> str:
        found = group["roles"].get(role)
        return f"{score(found, metric)}\n{printable(found['attack'])}" if found else "-"

    rows = [
        [
            title,
            str(group["attacks"]),
            *(best(group, role) for role in SHOWN_ROLES),
            gap_lines(group["gap_closed"]),
        ]
        for title, group in groups.items()
        if group
    ]
    return Table(["worst of", "attacks", *SHOWN_ROLES, "gap closed"], rows)


def searches_table(summary: Record) -> Table | None:
    """Return each search and role: trials, what became of them, and the winner; None without searches."""
    rows = []
    for search in summary.get("searches") or ():
        for role in SHOWN_ROLES:
            found = search["roles"].get(role)
            if not found:
                continue
            states = [trial["state"] for trial in found["trials"]]
            best = next((trial for trial in found["trials"] if trial["number"] == found["best"]), None)
            rows.append(
                [
                    name(search["name"]),
                    role,
                    printable(describe(best["strategy"])) if best and best["strategy"] else "-",
                    f"{search['sampler']}, {search['steps']} steps",
                    *(str(count) for count in (len(states), states.count("pruned"), states.count("failed"))),
                    "-" if found["best"] is None else str(found["best"]),
                    number(best["value"] if best else None, summary["metric"]),
                ]
            )
    head = ["search", "role", "winner", "sampler", "trials", "pruned", "failed", "won by trial", "on select"]
    return Table(head, rows, 4) if rows else None


def horizons_table(summary: Record) -> Table | None:
    """Return SGRC in the course of each attack; None where no attack has a course."""
    courses = {attack["attack"]: attack["horizons"] for attack in summary["attacks"] if attack.get("horizons")}
    if not courses:
        return None
    longest = max(courses.values(), key=len)
    head = [f"after {point['step'] / longest[-1]['step']:.0%}" for point in longest]
    rows = [
        [name(attack), f"{course[-1]['step']:g}", *(percent(point["sgrc"]) for point in course)]
        for attack, course in courses.items()
        if len(course) == len(longest)
    ]
    return Table(["attack", "steps", *head], rows)


def decay_table(summary: Record) -> Table | None:
    """Return the attacks that differ only in their length, a row each; None where there are none."""
    rows = []
    for group in summary.get("decay") or ():
        rows += [
            [Name(printable(attack)), str(steps), percent(sgrc), "-" if closed is None else f"{closed:.2f}"]
            for attack, steps, sgrc, closed in zip(
                group["attacks"], group["steps"], group["sgrc"], group["gap_closed"], strict=True
            )
        ]
    return Table(["attack", "steps", "SGRC", "gap closed"], rows) if rows else None


def benign_table(summary: Record) -> Table | None:
    """Return what protection takes from those who fine-tune on the benign domain; None where that was not tried."""
    metric = summary["metric"]
    rows = [
        [
            name(attack["attack"]),
            *(score(attack["roles"].get(role), metric) for role in SHOWN_ROLES),
            interval(attack["harm"], metric),
            percent(attack["sgrc"]),
        ]
        for attack in (summary.get("benign") or {}).get("attacks", ())
    ]
    return Table(["attack", *SHOWN_ROLES, "harm", "SGRC"], rows) if rows else None


def controls_table(summary: Record) -> Table | None:
    """Return what the results are to be read against: no attack, the unprotected model, tuned scratch, the oracle."""
    controls, metric = summary.get("controls") or {}, summary["metric"]
    rows: list[Sequence[str]] = []

    def add(title: str, by_role: Mapping[str, Record | None], attack: str) -> None:
        cells = [score(by_role.get(role), metric) for role in SHOWN_ROLES]
        rows.append([title, name(attack), *cells])

    for attack, roles in (controls.get("no_attack") or {}).items():
        add("no attack, only what the head needs", roles, attack)
    best = (summary["worst_case"]["overall"] or {"roles": {}})["roles"].get("unprotected")
    if best:
        add("unprotected, its best attack", {"unprotected": best}, best["attack"])
    if tuned := controls.get("tuned_scratch"):
        add("scratch, tuned", {"scratch": tuned}, tuned["attack"])
    if oracle := controls.get("oracle"):
        more = f", {oracle['data_ratio']:.3g} times the data" if oracle["data_ratio"] else ""
        add(f"oracle: unprotected{more}", {"unprotected": oracle}, oracle["attack"])
    return Table(["control", "attack", *SHOWN_ROLES], rows, 2) if controls and rows else None


def further_table(summary: Record) -> Table | None:
    """Return the further measurements, means over the attempts that succeeded; None where there are none."""
    rows: list[Sequence[str]] = []
    for attack in summary["attacks"]:
        details = [(attack["roles"].get(role) or {}).get("details") or {} for role in SHOWN_ROLES]
        names: dict[str, Any] = dict.fromkeys(each for found in details for each in found)
        rows += [
            [name(attack["attack"]), printable(each), *(number(found.get(each), _PLAIN) for found in details)]
            for each in names
        ]
    return Table(["attack", "measurement", *SHOWN_ROLES], rows, 2) if rows else None
