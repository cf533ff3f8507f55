"""The audit for people: a table for the terminal, a Markdown report, one HTML page, and the curves as Parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sophon.audit.metrics import SCHEMA_VERSION
from sophon.audit.verdict import Record, printable
from sophon.errors import UserError
from sophon.files import read_json, write_bytes, write_text
from sophon.paths import exists
from sophon.report import sections, tables
from sophon.report.document import Document

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = ["attack", "role", "seed", "step", "select", "exposure", "domain"]
_NEEDED = ("verdict", "metric", "attacks", "worst_case", "intactness", "checkpoint", "config")


def read_audit(folder: Path, key: str = "run_dir") -> dict[str, Any]:
    """Read the ``audit.json`` of an audit's folder.

    Args:
        folder: the audit's run directory.
        key: the configuration key that named it, for messages.

    Raises:
        UserError: there is none, it is not JSON, of another schema version or not whole.
    """
    path = folder / "audit.json"
    if not exists(path, key):
        raise UserError(f"{key}: '{folder}' holds no audit.json; run `sophon audit run_dir={folder} ...` first")
    summary = read_json(path)
    found = summary.get("schema_version") if isinstance(summary, dict) else None
    if found != SCHEMA_VERSION:
        raise UserError(
            f"{key}: '{path}' is of schema version {found}; this sophon reads version {SCHEMA_VERSION}; "
            "run `sophon audit` again"
        )
    if missing := [part for part in _NEEDED if part not in summary]:
        raise UserError(f"{key}: '{path}' has no {', '.join(missing)}; run `sophon audit` again")
    return dict(summary)


def curves_frame(attempts: Sequence[Record]) -> pd.DataFrame:
    """Return every point of every curve as a row, sorted.

    Returns:
        Columns ``attack``, ``role``, ``seed`` (int64), ``step`` (int64), ``select`` (float64, the metric on the
        attacker's ``select`` split, NaN where it was not finite), ``exposure`` and ``domain``.
    """
    import pandas as pd  # only here: most commands never write a table

    rows = [
        (a["attack"], a["role"], a["seed"], point["step"], point["select"], a["exposure"], _domain(a))
        for a in attempts
        for point in a["curve"]
    ]
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    frame = frame.astype({"seed": "int64", "step": "int64", "select": "float64"})
    return frame.sort_values(_COLUMNS, ignore_index=True)


def _domain(attempt: Record) -> str:
    return attempt.get("domain") or "restricted"


def write_curves(run_dir: Path, attempts: Sequence[Record]) -> None:
    """Write `curves_frame` to ``curves.parquet``, atomically."""
    buffer = io.BytesIO()
    curves_frame(attempts).to_parquet(buffer, index=False)
    write_bytes(run_dir / "curves.parquet", buffer.getvalue())


def table(summary: Record) -> str:
    """Return the attacks as a Markdown table that also reads well in a terminal.

    Args:
        summary: what `sophon.audit.metrics.summarise` returned.

    Returns:
        Lines without a final newline: attack, exposure, the mean test metric of each role with the half width of its
        95 % interval, gap closed with its interval.
    """
    return tables.short_table(summary).markdown()


def write_reports(run_dir: Path, summary: Record, attempts: Sequence[Record]) -> None:
    """Write ``report.html`` (one self-contained file) and ``report.md``, atomically.

    Args:
        run_dir: the audit's folder; pictures that it lacks are named in the page instead of shown.
        summary: what `sophon.audit.metrics.summarise` returned, or ``audit.json``, also an older one.
        attempts: the stored attempts, for the curves and the pictures.

    Raises:
        UserError: a file cannot be written.
    """
    document = Document(
        title=printable(f"Audit of {(summary['checkpoint'] or {}).get('name') or 'a checkpoint'}"),
        lead=printable(summary["verdict"]),
        notes=[sections.thresholds(summary)],
        cards=sections.cards(summary),
        sections=sections.sections(run_dir, summary, attempts),
    )
    write_text(run_dir / "report.html", document.html())
    write_text(run_dir / "report.md", document.markdown())
