"""An audit's report, read and written: attempts, context, results, verdict; ``audit.json`` and two Parquet files."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self

import pandas as pd

from sophon.auditing import gap_closed, scores
from sophon.auditing.knowing import Knowing, knowing_of
from sophon.auditing.masking import Masking, Norms, Seen
from sophon.auditing.results import Results, results
from sophon.auditing.scores import Difference
from sophon.auditing.table import Attempts
from sophon.auditing.verdict import HARM_ABOVE, Verdict, verdict
from sophon.errors import UserError
from sophon.files import read_json, write_bytes, write_json
from sophon.paths import exists
from sophon.tasks import Measured, Metric

SCHEMA_VERSION = 3
_TABLES = ("attempts", "curves")


@dataclass(frozen=True)
class Intactness:
    """What protection costs the original domain, on its test split.

    Attributes:
        metric: of the original domain.
        before: of the reference.
        after: of the protected model.
        loss: the difference, positive where protection hurts; its interval takes the two as independent.
        images: how many were measured.
    """

    metric: Metric
    before: float
    after: float
    loss: Difference
    images: int

    @classmethod
    def of(cls, metric: Metric, before: Measured, after: Measured) -> Self:
        """Compare two measurements."""
        value = metric.sign * (before.value - after.value)
        half = scores.Z * math.hypot(before.standard_error, after.standard_error)
        return cls(metric, before.value, after.value, Difference(value, value - half, value + half), before.images)


@dataclass(frozen=True)
class Context:
    """What is known of an audit besides its attempts; what is not known is None or empty.

    Attributes:
        date: of the audit, ISO.
        checkpoint: ``path``, ``sha256``, ``name`` and ``method`` of what was attacked.
        reference: the same of the unprotected model.
        filtered: by role the same of filtered models, with ``original``, their metric on the original domain's test
            split.
        domains: names of ``original``, ``restricted`` and ``benign``.
        hashes: of the restricted domain's splits.
        support: of protection's sampler; None if it was not protected by sophon.
        mechanisms: in a word each, how it was protected; None where that is not known.
        intactness: None where it was not measured.
        searches: contents of ``searches/*.json``.
        left_out: attacks that do not fit the models, with the reason.
        masking: None where it was not looked for.
        geometry: a row a model, see `sophon.auditing.geometry`.
        gallery: ``title`` and ``file`` of pictures.
        feature_network: what a Frechet distance was measured with.
        config: the run's, with the model that was loaded.
        packages: versions.
    """

    date: str = ""
    checkpoint: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    filtered: dict[str, dict[str, Any]] = field(default_factory=dict)
    domains: dict[str, str | None] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    support: dict[str, Any] | None = None
    mechanisms: list[str] | None = None
    intactness: Intactness | None = None
    searches: list[dict[str, Any]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    masking: Masking | None = None
    geometry: list[dict[str, Any]] = field(default_factory=list)
    gallery: list[dict[str, str]] = field(default_factory=list)
    feature_network: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class AuditReport:
    """An audit, scored and judged; nothing in it depends on the order of the attempts."""

    attempts: Attempts
    context: Context
    results: Results
    knowing: Knowing
    verdict: Verdict

    @classmethod
    def of(cls, attempts: Attempts, context: Context) -> Self:
        """Score attempts, and judge them."""
        scored = results(attempts)
        known = (context.config.get("attack") or {}).get("knowing") or {}
        knowing = knowing_of(scored, context.mechanisms, known)
        return cls(attempts, context, scored, knowing, verdict(scored, context, knowing))

    def json(self) -> dict[str, Any]:
        """Return the content of ``audit.json``: plain data, None for what is not known.

        ``date`` and ``seconds_total`` alone depend on when and how fast it was made.
        """
        content: dict[str, Any] = _plain(
            {
                "schema_version": SCHEMA_VERSION,
                "verdict": self.verdict,
                "knowing": self.knowing,
                "attempts": len(self.attempts.table),
                "seconds_total": float(self.attempts.table["seconds"].sum()),
                "thresholds": {
                    "holds_from": gap_closed.HOLDS_FROM,
                    "no_protection_below": gap_closed.NO_PROTECTION_BELOW,
                    "middle": gap_closed.MIDDLE,
                    "harm_above": HARM_ABOVE,
                },
                **{part.name: getattr(self.results, part.name) for part in fields(self.results)},
                "masked_share": self.results.masked_share,
                **{part.name: getattr(self.context, part.name) for part in fields(self.context)},
                "searches": _by_role(self.context.searches),
            }
        )
        return content

    def write(self, folder: Path) -> None:
        """Write ``attempts.parquet``, ``curves.parquet`` and, last, ``audit.json``, atomically."""
        for name, frame in zip(_TABLES, self.attempts, strict=True):
            buffer = io.BytesIO()
            frame.to_parquet(buffer, index=False)
            write_bytes(folder / f"{name}.parquet", buffer.getvalue())
        write_json(folder / "audit.json", self.json())

    @classmethod
    def read(cls, folder: Path, key: str = "run_dir") -> Self:
        """Read an audit's folder, and score it anew.

        Raises:
            UserError: there is no audit, it is of another schema version, or a file is missing or damaged.
        """
        path = folder / "audit.json"
        if not exists(path, key):
            raise UserError(f"{key}: '{folder}' holds no audit.json; run `sophon audit run_dir={folder} ...` first")
        stored = read_json(path)
        version = stored.get("schema_version") if isinstance(stored, dict) else None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{key}: '{path}' is of schema version {version}; this sophon reads version {SCHEMA_VERSION}; "
                "run `sophon audit` again"
            )
        try:
            tables = [pd.read_parquet(folder / f"{name}.parquet") for name in _TABLES]
            facts = {part.name: stored[part.name] for part in fields(Context)}
            context = Context(**facts | _typed(stored) | {"searches": _one_by_one(stored["searches"])})
            return cls.of(Attempts(*tables), context)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{key}: '{folder}' is not whole ({error}); run `sophon audit` again") from error


def _by_role(searches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return searches by name, each with its course against every role: the form that ``audit.json`` has."""
    courses: dict[str, dict[str, Any]] = {}
    for search in searches:
        course = {key: value for key, value in search.items() if key not in ("name", "role")}
        courses.setdefault(search["name"], {})[search["role"]] = course
    return [{"name": name, "roles": roles} for name, roles in courses.items()]


def _one_by_one(searches: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Undo `_by_role`."""
    return [
        {"name": search["name"], "role": role, **course}
        for search in searches
        for role, course in search["roles"].items()
    ]


def _typed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parts of a stored context that are no plain data."""
    kept, masking = (_known(stored[key]) for key in ("intactness", "masking"))
    if kept is not None:
        kept = Intactness(**kept | {"metric": Metric(**kept["metric"]), "loss": Difference(**kept["loss"])})
    if masking is not None:
        norms, seen = [Norms(**row) for row in masking["norms"]], [Seen(**row) for row in masking["seen"]]
        masking = Masking(norms, seen, masking["left_out"])
    return {"intactness": kept, "masking": masking}


def _known(data: Any) -> Any:
    """Turn the None of what is not known into NaN, within mappings and lists."""
    if isinstance(data, Mapping):
        return {key: math.nan if value is None else _known(value) for key, value in data.items()}
    return [_known(member) for member in data] if isinstance(data, list) else data


def _plain(data: Any) -> Any:
    """Turn data into what JSON can hold: string keys, lists, and None for numbers that are not finite."""
    if is_dataclass(data) and not isinstance(data, type):
        return _plain(asdict(data))
    if isinstance(data, Mapping):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
