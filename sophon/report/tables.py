"""What an audit says, as tables of text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pandas as pd

from sophon.auditing.attack_scores import Attack, Roles
from sophon.auditing.gap_closed import Gap
from sophon.auditing.results import Results
from sophon.auditing.scores import Difference, Score
from sophon.auditing.summary import AuditReport
from sophon.auditing.table import MEASURED, Attempts
from sophon.auditing.words import Record, describe, format_number, known, printable
from sophon.auditing.worst_case import WorstCase
from sophon.held_out import EXPOSURE_WORDS, EXPOSURES
from sophon.report.page import Name, Table
from sophon.tasks import Metric

FRECHET = "Frechet distance"
_READING = {"own_best": "own best attack", "same_attack": "same attack"}


def shown(results: Results) -> list[str]:
    """Return the roles from left to right: from what an attacker has without the model to what is left to it."""
    return results.roles[::-1]


def name(text: str) -> Name:
    """Return what somebody called something, as a cell."""
    return Name(printable(text))


def metric_name(metric: Metric) -> str:
    """Return what was measured, with its unit."""
    return f"{metric.name} ({metric.unit})" if metric.unit else metric.name


def score(value: Score | None, metric: Metric) -> str:
    """Write a mean with its interval, and how many attempts diverged."""
    if not value or not (value.seeds or value.diverged):
        return "-"
    diverged = f"\n{value.diverged} diverged" if value.diverged else ""
    return _with_interval(value.mean, value.low, value.high, metric) + diverged


def gap(value: Gap | None, yardstick: str = "scratch") -> str:
    """Write gap closed or R with its interval, or the reason why there is none, below it."""
    if value is None:
        return "-"
    ends = "" if math.isnan(value.low) else f"[{value.low:.2f}, {value.high:.2f}]"
    parts = [ratio(value.value), ends, f"worse than {yardstick}" if value.value > 1 else "", value.reason]
    return "\n".join(part for part in parts if part)


def ratio(value: float) -> str:
    """Write gap closed or R without its interval."""
    return f"{value:.2f}" if known(value) else "-"


def difference(value: Difference, metric: Metric) -> str:
    """Write a difference with its interval."""
    return _with_interval(value.value, value.low, value.high, metric)


def _with_interval(value: float, low: float, high: float, metric: Metric) -> str:
    ends = "" if math.isnan(low) else f"\n[{format_number(low, metric)}, {format_number(high, metric)}]"
    return format_number(value, metric) + ends


def percent(value: float) -> str:
    """Write SGRC."""
    return f"{value:.1f} %" if known(value) else "-"


def _exposure(attack: Attack) -> str:
    """Say what protection knew of an attack, and in what the attack lies outside of that."""
    return printable(EXPOSURE_WORDS[attack.exposure] + (f": {attack.outside}" if attack.outside else ""))


def _cells(results: Results, roles: Roles) -> list[str]:
    return [score(roles.get(role), results.metric) for role in shown(results)]


def removal_cells(results: Results, *cells: str) -> list[str]:
    """Return ``cells`` that only an audit with a filtered model has, else none."""
    return list(cells) if results.best_filtered else []


def short_table(results: Results) -> Table:
    """Return what fits a terminal: attack, exposure, each role's mean test metric, gap closed and R."""
    unit = f" ({results.metric.unit})" if results.metric.unit else ""
    rows = [
        [
            name(attack.attack),
            _exposure(attack),
            *(format_number(attack.roles.get(role, Score()).mean, results.metric) for role in shown(results)),
            ratio(attack.gap_closed.value),
            *([ratio(attack.removal.value)] if attack.removal else []),
        ]
        for attack in results.attacks
    ]
    head = [
        "attack",
        "exposure",
        *(f"{role}{unit}" for role in shown(results)),
        "gap closed",
        *removal_cells(results, "R"),
    ]
    return Table(head, rows, 2)


def attacks_table(results: Results) -> Table:
    """Return every attack with its scores; what gets most out of the protected model comes first.

    What an attack does stands small below its name: of a search, whose winners differ by role, what the protected
    model suffers.
    """
    metric = results.metric

    def success(attack: Attack) -> float:
        mean = attack.roles.get("protected", Score()).mean
        return metric.sign * mean if known(mean) else -math.inf

    attacks = sorted(results.attacks, key=success, reverse=True)
    means = [attack.roles.get(role, Score()).mean for attack in attacks for role in shown(results)]
    scale = strengths(means, metric)
    width = len(shown(results))
    rows = [
        [
            Name(
                f"{printable(attack.attack)}\n{'winner: ' * bool(attack.trials)}{printable(describe(attack.strategy))}"
            ),
            _exposure(attack),
            percent(attack.sgrc),
            percent(attack.signed_rfd),
            *_cells(results, attack.roles),
            gap(attack.gap_closed),
            *removal_cells(results, gap(attack.removal, str(results.best_filtered))),
        ]
        for attack in attacks
    ]
    levels = [
        [
            *scale[index * width : (index + 1) * width],
            *(gap_strength(gap.value) for gap in (attack.gap_closed, attack.removal) if gap),
        ]
        for index, attack in enumerate(attacks)
    ]
    head = ["attack", "exposure", "SGRC", "signed RFD", *shown(results), "gap closed", *removal_cells(results, "R")]
    return Table(head, rows, 2, levels)


def strengths(values: Sequence[float], metric: Metric) -> list[int | None]:
    """Return how good each value is for the attacker among all of them, 0 (worst) .. 100 (best); None for NaN.

    Percentages are compared by differences; other units, whose values span orders of magnitude, by ratios where all
    are positive.
    """
    numbers = [value for value in values if known(value)]
    ratios = metric.unit != "%" and all(value > 0 for value in numbers)
    places = [metric.sign * (math.log(value) if ratios and known(value) else value) for value in values]
    low, high = (end((place for place in places if known(place)), default=0.0) for end in (min, max))
    if not 0 < high - low < math.inf:
        return [None] * len(values)
    return [round(100 * ((place - low) / (high - low))) if known(place) else None for place in places]


def gap_strength(value: float) -> int | None:
    """Return how good a gap closed is for the attacker: 100 for 0 and below, 0 for 1 and above; None for NaN."""
    return round(100 * min(max(1 - value, 0.0), 1.0)) if known(value) else None


def worst_table(results: Results) -> Table:
    """Return the worst cases: of all attacks in both readings; by exposure and family in the one that decides."""
    groups = {
        EXPOSURE_WORDS[exposure]: results.worst_case[exposure]
        for exposure in EXPOSURES
        if exposure in results.worst_case
    }
    groups |= {f"family {printable(family)}": worst for family, worst in results.families.items()}
    rows: list[list[str]] = []

    def add(title: str, worst: WorstCase, reading: str) -> None:
        case = getattr(worst, reading)
        words = _READING[reading] if worst.readings_differ else "both"
        decides = "\nthe lower" if reading == worst.decided_by and worst.readings_differ else ""
        cells = [
            f"{score(case.roles[role], results.metric)}\n{printable(case.attacks[role])}" if role in case.roles else "-"
            for role in shown(results)
        ]
        rows.append(
            [
                *(title, str(len(worst.tried)), words + decides, *cells),
                *(gap(case.gap_closed), str(case.gap_closed.state).lower()),
                *removal_cells(results, gap(case.removal, str(results.best_filtered))),
            ]
        )

    if overall := results.worst_case.get("overall"):
        add("all attacks", overall, "own_best")
        if overall.readings_differ:
            add("all attacks", overall, "same_attack")
    for title, worst in groups.items():
        add(title, worst, worst.decided_by)
    head = ["worst of", "attacks", "reading", *shown(results), "gap closed", "judged", *removal_cells(results, "R")]
    return Table(head, rows)


def searches_table(trials: pd.DataFrame, metric: Metric) -> Table:
    """Return each search and role: trials, what became of them, and the winner."""
    rows = []
    for (search, role), group in trials.groupby(["search", "role"]):
        won = group[group["won"]]
        first, states = group.iloc[0], group["state"].value_counts()
        rows.append(
            [
                name(str(search)),
                str(role),
                printable(describe(json.loads(won["strategy"].iloc[0]))) if len(won) else "-",
                f"{first['sampler']}, {first['steps']} steps",
                *(str(count) for count in (len(group), states.get("pruned", 0), states.get("failed", 0))),
                str(won["trial"].iloc[0]) if len(won) else "-",
                format_number(float(won["value"].iloc[0]), metric) if len(won) else "-",
            ]
        )
    head = ["search", "role", "winner", "sampler", "trials", "pruned", "failed", "won by trial", "on select"]
    return Table(head, rows, 4)


def benign_table(results: Results) -> Table:
    """Return what protection takes from those who fine-tune on the benign domain."""
    metric = results.metric
    rows = [
        [
            *(name(benign.attack), *_cells(results, benign.roles), difference(benign.harm, metric)),
            *(percent(benign.sgrc), percent(benign.signed_rfd)),
        ]
        for benign in results.benign
    ]
    return Table(["attack", *shown(results), "harm", "SGRC", "signed RFD"], rows)


def controls_table(results: Results) -> Table:
    """Return what the results are to be read against: no attack, scratch at its best, the oracle."""
    rows: list[Sequence[str]] = [
        ["no attack, only what the head needs", name(attack), *_cells(results, roles)]
        for attack, roles in results.no_attack.items()
    ]
    if oracle := results.oracle:
        more = f", {oracle.data_ratio:.3g} times the data" if known(oracle.data_ratio) else ""
        cells = _cells(results, {"unprotected": oracle.score})
        rows.append([f"oracle: unprotected{more}", name(oracle.attack), *cells])
    title = "distillation floor: a student of the model, from original images alone, then fine-tuned"
    if floor := results.distillation_floor:
        rows.append([title, name(floor.attacks.get("protected", "-")), *_cells(results, floor.roles)])
    else:
        rows.append([title, "not run", *("-" for _ in shown(results))])
    return Table(["control", "attack", *shown(results)], rows, 2)


def further_table(attempts: Attempts, roles: Sequence[str]) -> Table:
    """Return the further measurements, means over the attempts that did not diverge."""
    table = attempts.table
    kept = table[~table["diverged"] & (table["domain"] == "restricted") & (table["steps"] > 0)]
    columns = [str(column) for column in table if str(column).startswith(MEASURED)]
    means = kept.groupby(["attack", "role"])[columns].mean()
    rows: list[Sequence[str]] = []
    for attack, group in means.groupby(level="attack"):
        by_role = group.droplevel("attack")
        for column in columns:
            values = [float(by_role[column].get(role, math.nan)) for role in roles]
            if any(map(known, values)):
                cells = [f"{value:.4g}" if known(value) else "-" for value in values]
                rows.append([name(str(attack)), printable(column.removeprefix(MEASURED)), *cells])
    return Table(["attack", "measurement", *roles], rows, 2)


def origins_table(audit: AuditReport) -> Table:
    """Return the checkpoints that were compared."""
    context = audit.context
    origins = {"protected": context.checkpoint, "unprotected": context.reference, **context.filtered}
    rows = [[role, *_origin(origin)] for role, origin in origins.items() if origin]
    return Table(["model", "name", "method", "checkpoint"], rows, 4)


def _origin(origin: Record) -> list[str]:
    path, sha256, *rest = (printable(str(origin.get(key) or "-")) for key in ("path", "sha256", "name", "method"))
    return [*rest, f"{path}\nsha256 {sha256}"]
