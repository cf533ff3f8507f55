"""Scores in words: how a metric's values are written, and the one sentence that sums an audit up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Record = Mapping[str, Any]

ROLES = ("protected", "unprotected", "scratch")
# Within the support that protection sampled attackers from; outside it only in the number of steps; anything else.
EXPOSURES = ("seen", "longer", "held_out")

# The verdict's words. Gap closed is 0 where the protected model is as good a start as the unprotected one and 1 where
# it is no better than scratch, which is what protection promises; 0.1 on either side is left to noise.
NO_PROTECTION_BELOW = 0.1
HOLDS_FROM = 0.9


def format_value(value: float | None, metric: Record) -> str:
    """Write a metric's value for people: ``41.0 %``, or four digits and the unit; ``-`` for None."""
    if value is None:
        return "-"
    return f"{value:.1f} %" if metric["unit"] == "%" else f"{value:.4g} {metric['unit']}".rstrip()


def format_difference(value: float | None, metric: Record) -> str:
    """Write a difference of two values of a metric: percentages differ by points."""
    return format_value(value, metric).replace(" %", " points")


_WHO = {
    "seen": "the simulated kind of attacker",
    "longer": "simulated attackers with another number of steps",
    "held_out": "held-out attacks",
    "overall": "the attacks that were tried",
}
_STATES = {"holds": "holds against", "weakens": "only weakens", "fails": "does not hold against"}


def _state(group: Record) -> str:
    gap = group["gap_closed"]["value"]
    if gap is None:
        return "unknown"
    return "holds" if gap >= HOLDS_FROM else "weakens" if gap >= NO_PROTECTION_BELOW else "fails"


def _evidence(group: Record, metric: Record) -> str:
    roles, gap = group["roles"], group["gap_closed"]
    if "protected" not in roles:
        return "no result of the protected model"
    others = [f"{role} {format_value(roles[role]['mean'], metric)}" for role in ROLES[1:] if role in roles]
    others += [f"gap closed {gap['value']:.2f}"] if gap["value"] is not None else [gap["reason"]]
    best = roles["protected"]
    return f"'{best['attack']}' reaches {format_value(best['mean'], metric)}; {', '.join(others)}"


def verdict(summary: Record) -> str:
    """Say in one sentence what held, what broke it and at what cost."""
    metric, worst = summary["metric"], summary["worst_case"]
    groups = {key: worst[key] for key in EXPOSURES if worst[key]}
    # Without a sampler nothing is held out from anything; and groups too small to judge may do so together.
    if not summary["support"] or all(_state(group) == "unknown" for group in groups.values()):
        groups = {"overall": worst["overall"]}
    states = {key: _state(group) for key, group in groups.items()}
    judged = set(states.values()) - {"unknown"}

    def against(state: str) -> str:
        return " and ".join(f"{_WHO[k]} ({_evidence(groups[k], metric)})" for k in groups if states[k] == state)

    if not judged:
        text = f"Protection cannot be judged ({_evidence(worst['overall'], metric)})"
    elif judged == {"fails"}:
        text = f"No protection against {against('fails')}"
    else:
        text = "Protection " + ", but ".join(
            f"{words} {against(state)}" for state, words in _STATES.items() if state in judged
        )
    if judged and "unknown" in states.values():
        text += f"; it cannot be judged against {against('unknown')}"
    return f"{text}; {_cost(summary)}."


def _cost(summary: Record) -> str:
    intactness, worst = summary["intactness"], summary["worst_case"]["overall"]
    if intactness and intactness["loss"] is not None:
        cost = f"intactness loss {format_difference(intactness['loss'], intactness)}"
    else:
        cost = "intactness was not measured"
    seeds = [role["n"] for role in worst["roles"].values()]
    return f"{cost}; some results rest on one seed" if 1 in seeds else cost
