"""From an audit's attempts to ``audit.json``: checks them, sorts attacks from controls, scores and sums them up.

Nothing depends on the order of the attempts. The formulas are in `sophon.audit.scores`, what is made of the attempts of
an attack in `sophon.audit.results`, the sentence in `sophon.audit.verdict`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sophon.audit.results import (
    benign,
    by_attack,
    decay,
    families,
    mean_curve,
    result,
    score,
    steps_of,
    successful,
    worst_case,
)
from sophon.audit.scores import Array, ci95, finite, points, resample, sign_of
from sophon.audit.undone import undone
from sophon.audit.verdict import EXPOSURES, HARM_ABOVE, HOLDS_FROM, NO_PROTECTION_BELOW, ORACLE, ROLES, Record, verdict
from sophon.errors import UserError

__all__ = ["SCHEMA_VERSION", "Array", "ci95", "mean_curve", "points", "resample", "successful", "summarise"]

SCHEMA_VERSION = 1

DOMAINS = ("restricted", "benign")

_REQUIRED = {
    "schema_version", "id", "attack", "role", "seed", "strategy", "exposure", "outside", "metric", "curve", "test",
    "seconds", "flops", "steps",
}  # fmt: skip
_PASSED_ON = (
    "checkpoint", "reference", "support", "domains", "hashes", "left_out", "config", "packages", "feature_network",
    "gallery",
)  # fmt: skip


def summarise(attempts: Sequence[Record], context: Record) -> dict[str, Any]:
    """Score an audit: the content of ``audit.json``.

    What counts as an attack that was tried (``worst_case.*.tried``): what was run on the restricted domain for at least
    one step, whether or not it succeeded, and of a search its winner. Not the oracle, whose data an attacker lacks, nor
    models that were not fine-tuned: these are ``controls``. Nor benign fine-tuning.

    Args:
        attempts: contents of ``attempts/*.json``, in any order.
        context: ``checkpoint``, ``reference``, ``intactness``, ``support``, ``domains`` and their ``hashes``,
            ``left_out`` (attacks that do not fit the models), ``config``, ``packages``, and of generating models
            ``feature_network`` (the name of what a Frechet distance was measured with) and ``gallery`` (what
            `sophon.audit.gallery.write_gallery` returned); whatever is missing is stored as None. ``masking``: what
            `sophon.audit.masking.measure` returned. And ``searches``:
            contents of ``searches/*.json``, each of one ``role``, or entries of the summary's ``searches``, whose
            ``roles`` each have ``trials`` and ``best`` (the winner's number).

    Returns:
        Plain JSON data without NaN. Only ``seconds_total`` depends on how fast the machine was. ``masking`` has what
        was ``measured`` (None if nothing was), and ``pairs`` and ``share`` as `sophon.audit.undone.undone` returns
        them.

    Raises:
        UserError: there is no attempt, or one is malformed or does not fit the others.
    """
    _check(attempts)
    ordered = sorted(attempts, key=lambda a: (a["attack"], a["role"], a["seed"], a["id"]))
    metric = dict(ordered[0]["metric"])
    # Divergent attacks may overflow; `_plain` turns what comes of it into None.
    with np.errstate(all="ignore"):
        scores = _scores(ordered, metric)
    summary = {"schema_version": SCHEMA_VERSION, "metric": metric, "attempts": len(ordered), **scores}
    summary["intactness"] = _intactness(context.get("intactness"))
    summary["masking"] = {"measured": context.get("masking"), **undone(scores["attacks"])}
    summary["searches"] = _searches(context.get("searches") or (), sign_of(metric))
    summary |= {key: context.get(key) for key in _PASSED_ON}
    summary["thresholds"] = {
        "holds_from": HOLDS_FROM,
        "no_protection_below": NO_PROTECTION_BELOW,
        "harm_above": HARM_ABOVE,
    }
    summary["seconds_total"] = math.fsum(a["seconds"] for a in ordered if finite(a["seconds"]))
    summary = _plain(summary)
    return {"verdict": verdict(summary), **summary}


def _scores(attempts: Sequence[Record], metric: Record) -> dict[str, Any]:
    """Return what follows from the attempts alone: attacks, worst cases, families, decay, controls and benign."""
    restricted = [a for a in attempts if _domain(a) == "restricted"]
    compared = by_attack(a for a in restricted if a["role"] != ORACLE)
    # An attack is a control for all its roles or for none.
    steps = {name: steps_of(next(iter(roles.values()))[0]) for name, roles in compared.items()}
    attacks = [result(name, roles, metric) for name, roles in compared.items() if steps[name]]
    attacks.sort(key=lambda a: EXPOSURES.index(a["exposure"]))
    groups = {"overall": attacks} | {e: [a for a in attacks if a["exposure"] == e] for e in EXPOSURES}
    worst = {name: worst_case(group, metric) for name, group in groups.items()}
    idle = {name: roles for name, roles in compared.items() if not steps[name]}
    return {
        "attacks": attacks,
        "worst_case": worst,
        "families": {name: worst_case(group, metric) for name, group in families(attacks).items()},
        "decay": decay(attacks, steps),
        "controls": {
            "no_attack": {name: {role: score(found) for role, found in roles.items()} for name, roles in idle.items()},
            "oracle": _oracle([a for a in restricted if a["role"] == ORACLE], metric),
            "tuned_scratch": _tuned_scratch(worst["overall"], compared),
        },
        "benign": benign([a for a in attempts if _domain(a) == "benign" and a["role"] != ORACLE], metric),
    }


def _domain(attempt: Record) -> str:
    return attempt.get("domain") or "restricted"


def _oracle(attempts: Sequence[Record], metric: Record) -> dict[str, Any] | None:
    """Score the oracle; of several, the best on ``select``."""
    by_name: dict[str, list[Record]] = {}
    for attempt in attempts:
        by_name.setdefault(attempt["attack"], []).append(attempt)
    found = [{"attack": name, "data_ratio": mine[0].get("data_ratio"), **score(mine)} for name, mine in by_name.items()]
    sign = sign_of(metric)
    return max(found, key=lambda each: (each["n"] > 0, sign * (each["select"] or 0), each["attack"]), default=None)


def _tuned_scratch(
    worst: Record | None, compared: Mapping[str, Mapping[str, Sequence[Record]]]
) -> dict[str, Any] | None:
    best = worst["roles"].get("scratch") if worst else None
    return {**best, "strategy": dict(compared[best["attack"]]["scratch"][0]["strategy"])} if best else None


def _searches(records: Sequence[Record], sign: int) -> list[dict[str, Any]]:
    """Return searches by name with the trials of each role in order and the best value up to each, ``best_so_far``."""
    found: dict[str, dict[str, Any]] = {}
    for record in sorted(records, key=lambda record: str(record["name"])):
        facts = {"name": record["name"], "sampler": record["sampler"], "steps": record["steps"]}
        search = found.setdefault(
            record["name"], facts | {"trials": record.get("budget", record["trials"]), "roles": {}}
        )
        for role, part in (record["roles"] if "roles" in record else {record["role"]: record}).items():
            trials = sorted(part["trials"], key=lambda trial: trial["number"])
            course = {"trials": trials, "best": part["best"], "best_so_far": _best_so_far(trials, sign)}
            search["roles"][role] = course
    for search in found.values():
        search["roles"] = {role: search["roles"][role] for role in ROLES if role in search["roles"]}
    return list(found.values())


def _best_so_far(trials: Sequence[Record], sign: int) -> list[float | None]:
    """Return the best complete value up to each trial, None before there is one; a pruned trial's came too early."""
    best: float | None = None
    course = []
    for trial in trials:
        value = trial["value"]
        if str(trial["state"]).lower() == "complete" and finite(value):
            best = value if best is None or sign * value > sign * best else best
        course.append(best)
    return course


def _intactness(given: Record | None) -> dict[str, Any] | None:
    if not given:
        return None
    before, after = ((given.get(when) or {}).get("test") for when in ("before", "after"))
    loss = None if before is None or after is None else sign_of(given) * (before - after)
    kept = {key: given[key] for key in ("metric", "unit", "higher_is_better")}
    return kept | {"before": before, "after": after, "loss": loss}


def _check(attempts: Sequence[Record]) -> None:
    if not attempts:
        raise UserError("attempts: none found; an audit needs at least one complete attempt")
    strategies: dict[tuple[str, str, str], Any] = {}
    for attempt in attempts:
        where = f"attempt '{attempt.get('id')}'"
        if missing := sorted(_REQUIRED - attempt.keys()):
            raise UserError(f"{where}: no {', '.join(missing)}; needed are {', '.join(sorted(_REQUIRED))}")
        if attempt["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"{where}: schema_version {attempt['schema_version']} is not known; allowed: {SCHEMA_VERSION}"
            )
        for key, allowed in (("role", (*ROLES, ORACLE)), ("exposure", EXPOSURES), ("domain", DOMAINS)):
            value = _domain(attempt) if key == "domain" else attempt[key]
            if value not in allowed:
                raise UserError(f"{where}: {key} '{value}' is not known; allowed: {', '.join(allowed)}")
        if attempt["metric"] != attempts[0]["metric"]:
            raise UserError(f"{where}: metric {attempt['metric']} differs from the other attempts'")
        which = (attempt["attack"], attempt["role"], _domain(attempt))
        if strategies.setdefault(which, attempt["strategy"]) != attempt["strategy"]:
            raise UserError(
                f"{where}: attack '{attempt['attack']}' was run with another strategy before; use a new run_dir"
            )


def _plain(data: Any) -> Any:
    """Turn data into what JSON can hold: string keys, lists, and None for numbers that are not finite."""
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
