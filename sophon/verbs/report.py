"""The verb that renders audits: report, and report compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sophon.api.common import default, required
from sophon.config import Config
from sophon.errors import UserError
from sophon.files import read_json
from sophon.paths import entries, exists
from sophon.report import single
from sophon.report.compare import write_comparison
from sophon.run_folder import owned


def report(config: Config) -> None:
    """Write an audit's reports again from its ``audit.json`` and ``attempts/``."""
    folder = Path(required(config.run_dir or str(default(config, "audit")), "run_dir"))
    several = exists(folder / "comparison.html", "run_dir")
    parts = [each for each in entries(folder, "run_dir") if exists(each / "audit.json")] if several else [folder]
    with ExitStack() as ownership:
        for each in {folder, *parts}:
            ownership.enter_context(owned(each))
        summaries = {each: _render(each) for each in parts}
        if several:
            compare_domains(folder, summaries)


def _render(folder: Path) -> dict[str, Any]:
    summary = single.read_audit(folder)
    attempts = [read_json(path) for path in entries(folder / "attempts") if path.suffix == ".json"]
    single.write_reports(folder, summary, attempts)
    say_found(folder, summary)
    return summary


def compare_domains(folder: Path, summaries: Mapping[Path, dict[str, Any]]) -> None:
    """Set the audits of one command side by side, and print what each found."""
    paths = sorted(summaries)
    page = write_comparison(paths, folder, "comparison")
    for path in paths:
        print(f"{path.name}: {summaries[path]['verdict']}")
    print(f"comparison: {page}")


def compare(config: Config) -> None:
    """Set audits side by side: ``compare.html`` and ``compare.md`` in ``out``."""
    if len(config.runs) < 2:
        raise UserError("report compare: give the run directories of two audits or more")
    folders: Sequence[Path] = [Path(required(path, "report compare")) for path in config.runs]
    with owned(config.out or "runs/compare", key="out") as out:
        print(f"comparison: {write_comparison(folders, out)}")


def say_found(folder: Path, summary: dict[str, Any]) -> None:
    """Print what an audit found."""
    print(single.table(summary))
    print(summary["verdict"])
    print(f"report: {folder / 'report.html'}")
