"""What `sophon.protect` and `sophon.audit` return."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sophon.checkpoint import write_checkpoint
from sophon.files import write_text

if TYPE_CHECKING:  # scores, tables and drawings need libraries that take long to load, and that no attack uses
    import pandas as pd

    from sophon.api.protect import Protection
    from sophon.auditing.summary import AuditReport
    from sophon.auditing.verdict import Verdict
    from sophon.auditing.worst_case import WorstCase


@dataclass(frozen=True, repr=False)
class Protected:
    """A protected model.

    Attributes:
        model: in evaluation mode.
        history: a row a round: losses, and the metric on ``val`` where the guard looked.
        manifest: what ``sophon.json`` says of it: ``intactness`` what the protection cost the original domain.
        protection: what it was made from.
    """

    model: nn.Module
    history: list[dict[str, Any]]
    manifest: dict[str, Any]
    protection: Protection

    def __repr__(self) -> str:
        """Return one line: what is protected, and for how long; a notebook prints it."""
        return f"Protected({self.protection.reference.spec.architecture}, {len(self.history)} rounds)"

    def save(self, folder: str | Path, audit: Audited | None = None) -> None:
        """Write the checkpoint: the library's own files, ``sophon.json`` and the model card.

        Args:
            audit: of this model, which the card then reports.

        Raises:
            UserError: ``folder`` holds something else, or the file system refuses.
        """
        manifest = self.manifest
        if audit is not None:
            from sophon.auditing.card import facts

            manifest = {**manifest, "audits": [facts(audit.report)]}
        write_checkpoint(folder, self.model, self.protection.reference.spec, manifest)


@dataclass(frozen=True, repr=False)
class Audited:
    """What an audit found.

    Attributes:
        report: all of it: attempts, results, verdict and what stands behind them.
        html: the page.
    """

    report: AuditReport
    html: str

    def __repr__(self) -> str:
        """Return the verdict as one line; a notebook prints it."""
        return f"Audited({self.verdict})"

    @property
    def verdict(self) -> Verdict:
        """What is to be said of the checkpoint: ``word``, ``sentence``, ``basis``, ``findings``."""
        return self.report.verdict

    @property
    def worst_case(self) -> WorstCase | None:
        """The worst case of all attacks, read in two ways; None if none was tried."""
        return self.report.results.worst_case.get("overall")

    @property
    def table(self) -> pd.DataFrame:
        """A row an attempt: what was run, on whom, and what came of it (see `sophon.auditing.table.Attempts`)."""
        return self.report.attempts.table

    def to_html(self, path: str | Path) -> None:
        """Write the page: one file that needs no other.

        Raises:
            UserError: the file system refuses.
        """
        write_text(path, self.html)
