"""Attempts as tidy tables: a row an attempt, a row a point of a curve, a row a trial of a search."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sophon.auditing.words import Record
from sophon.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 2  # of attempts and searches
MEASURED = "measured: "  # before the name of a further measurement, in a column's title


class Attempts(NamedTuple):
    """All that an audit's attempts brought.

    Attributes:
        table: a row an attempt: ``id``, ``attack``, ``domain``, ``role``, ``seed``, ``exposure``, ``outside`` (fields
            outside of what protection simulated, listed), ``trials`` (of the search that found it, else 0), the fields
            of its strategy (JSON where they are no scalars), ``strategy`` (all of it, JSON), ``metric``, ``unit``,
            ``higher_is_better``, ``test`` and its ``standard_error``, ``test_images``, ``select`` (where the curve
            ends), ``diverged``, ``data_ratio`` (of an oracle), ``seconds``, ``flops``, ``prepared_flops``, and
            `MEASURED` columns. NaN for what is not finite or not known.
        curves: a row a point: ``id``, ``attack``, ``domain``, ``role``, ``seed``, ``exposure``, ``step``, ``select``
            (the metric on the attacker's split), ``picture`` (a file below the run directory, or "").
    """

    table: pd.DataFrame
    curves: pd.DataFrame


_KEYS = ("id", "attack", "domain", "role", "seed", "exposure")


def tabulate(records: Iterable[Record]) -> Attempts:
    """Return the contents of ``attempts/*.json`` as tables, in an order that is not that of ``records``.

    Raises:
        UserError: there is none, or one of another schema version.
    """
    import pandas as pd  # only here and in what reads these tables: most commands never do

    rows, points = [], []
    for record in sorted(records, key=lambda record: (record["attack"], record["role"], record["seed"], record["id"])):
        if record["schema_version"] != SCHEMA_VERSION:
            raise UserError(
                f"run_dir: attempt '{record['id']}' is of schema version {record['schema_version']}; this sophon reads "
                f"version {SCHEMA_VERSION}; use a new run_dir"
            )
        keys = {key: record[key] for key in _KEYS}
        pictures = {picture["step"]: picture["file"] for picture in record["samples"]}
        curve = [{"step": p["step"], "select": _number(p["select"])} for p in record["curve"]]
        rows.append(keys | _row(record, [point["select"] for point in curve]))
        points += [keys | point | {"picture": pictures.get(point["step"], "")} for point in curve]
    if not rows:
        raise UserError("attempts: none found; an audit needs at least one complete attempt")
    columns = [*_KEYS, "step", "select", "picture"]
    return Attempts(pd.DataFrame(rows), pd.DataFrame(points, columns=columns).astype({"select": "float64"}))


def _row(record: Record, curve: Sequence[float]) -> dict[str, Any]:
    metric, test = record["metric"], _number(record["test"])
    ends = [value for value in curve if math.isfinite(value)]
    return {
        "outside": ", ".join(record["outside"]),
        "trials": (record["search"] or {}).get("trials", 0),
        **{key: json.dumps(value) if isinstance(value, list | Mapping) else value
           for key, value in record["strategy"].items()},
        "strategy": json.dumps(record["strategy"], sort_keys=True),
        "metric": metric["name"],
        "unit": metric["unit"],
        "higher_is_better": metric["higher_is_better"],
        "test": test,
        "standard_error": _number(record["standard_error"]),
        "test_images": record["test_images"],
        "select": ends[-1] if ends else math.nan,
        "diverged": not (record["finished"] and math.isfinite(test) and ends),
        "data_ratio": _number(record.get("data_ratio")),
        **{key: _number(record[key]) for key in ("seconds", "flops", "prepared_flops")},
        **{MEASURED + name: _number(value) for name, value in record["details"].items()},
    }  # fmt: skip


def _number(value: float | None) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else math.nan


def trials_table(searches: Iterable[Record], *, higher_is_better: bool) -> pd.DataFrame:
    """Return the contents of ``searches/*.json`` as a row a trial, sorted by search, role and trial.

    Returns:
        Columns ``search``, ``role``, ``sampler``, ``steps``, ``trial``, ``state``, ``value`` (on ``select``, NaN where
        it failed), ``strategy`` (JSON), ``won``, and ``best`` (the best complete value so far, NaN before there is
        one; a pruned trial's came too early).
    """
    import pandas as pd

    columns = ["search", "role", "sampler", "steps", "trial", "state", "value", "strategy", "won", "best"]
    rows, pick = [], max if higher_is_better else min
    for search in sorted(searches, key=lambda search: (search["name"], search["role"])):
        best = math.nan
        for trial in sorted(search["trials"], key=lambda trial: int(trial["number"])):
            value = _number(trial["value"])
            if trial["state"] == "complete" and math.isfinite(value):
                best = value if math.isnan(best) else pick(best, value)
            facts = [search["name"], search["role"], search["sampler"], search["steps"], trial["number"]]
            strategy = json.dumps(trial["strategy"], sort_keys=True)
            rows.append([*facts, trial["state"], value, strategy, trial["number"] == search["best"], best])
    return pd.DataFrame(rows, columns=columns)
