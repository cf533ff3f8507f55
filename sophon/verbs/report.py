"""The verb that renders audits: report, and report compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from sophon.api.common import required
from sophon.config import Config, default_folder
from sophon.errors import GateError, UserError
from sophon.paths import entries, exists
from sophon.run_folder import owned

if TYPE_CHECKING:  # `sophon.verbs.audit` imports this long before there is anything to report
    from sophon.auditing.summary import AuditReport


def report(config: Config) -> None:
    """Write an audit's reports again from what it wrote."""
    folder = Path(required(config.run_dir or str(default_folder(config, "audit")), "run_dir"))
    parts = parts_of(folder, "run_dir")
    several = parts != [folder]
    with ExitStack() as ownership:
        for path in {folder, *parts}:
            ownership.enter_context(owned(path))
        audits = {part: _render(part) for part in parts}
        if several:
            compare_domains(folder, audits)
    require(config, audits)


def parts_of(folder: Path, key: str) -> list[Path]:
    """Return the folders of an audit, one for each of several restricted domains; messages name ``key``."""
    if not exists(folder / "comparison.html", key):
        return [folder]
    return [path for path in entries(folder, key) if exists(path / "audit.json")]


def require(config: Config, audits: Mapping[Path, AuditReport]) -> None:
    """Raise a `GateError` that says in one line which audit does not come to what ``config.gate`` asks for."""
    from sophon.auditing.gate import failures

    missed = {path: failures(config.gate, audit) for path, audit in audits.items()}
    several = len(audits) > 1
    lines = [f"{path.name}: {failure}" if several else failure for path, failed in missed.items() for failure in failed]
    if lines:
        raise GateError("; ".join(lines))


def _render(folder: Path) -> AuditReport:
    from sophon.auditing.summary import AuditReport
    from sophon.report.audit import write_reports

    audit = AuditReport.read(folder)
    write_reports(folder, audit)
    say_found(folder, audit)
    return audit


def compare_domains(folder: Path, audits: Mapping[Path, AuditReport]) -> None:
    """Set the audits of one command side by side, and print what each found."""
    from sophon.report.compare import write_comparison

    page = write_comparison(sorted(audits), folder, "comparison")
    for path in sorted(audits):
        print(f"{path.name}: {audits[path].verdict}")
    print(f"comparison: {page}")


def compare(config: Config) -> None:
    """Set audits side by side: ``compare.html`` and ``compare.md`` in ``out``."""
    from sophon.report.compare import write_comparison

    if len(config.runs) < 2:
        raise UserError("report compare: give the run directories of two audits or more")
    folders: Sequence[Path] = [Path(required(path, "report compare")) for path in config.runs]
    with owned(config.out or "runs/compare", key="out") as out:
        print(f"comparison: {write_comparison(folders, out)}")


def say_found(folder: Path, audit: AuditReport) -> None:
    """Print what an audit found."""
    from sophon.report.audit import table

    print(table(audit))
    print(f"{audit.verdict} It rests on {audit.verdict.basis}.")
    print(f"- {audit.verdict.knowing}")
    for finding in audit.verdict.findings:
        print(f"- {finding}")
    print(f"report: {folder / 'report.html'}")
