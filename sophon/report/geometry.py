"""Distance to the reference and frozen features, in a page."""

from __future__ import annotations

from collections.abc import Iterator

from sophon.auditing.summary import AuditReport
from sophon.auditing.words import format_difference, known
from sophon.report.page import Element, Table


def geometry(audit: AuditReport) -> Iterator[Element]:
    """Yield how far models are from the reference, and what their features tell apart."""
    kept = audit.context.intactness
    metric = kept.metric if kept else audit.results.metric
    rows = [
        [
            row["role"],
            f"{row['distance']:.3g}" if known(row["distance"]) else "-",
            format_difference(row["barrier"], metric),
            f"{row['neighbours']:.1f} %" if known(row["neighbours"]) else "-",
        ]
        for row in audit.context.geometry
    ]
    if rows:
        yield (
            "Without any attack: the L2 distance of the parameters to the unprotected model's, relative to the norm of "
            "these; by how much the metric on the original domain's val split falls below a straight line on the way "
            "between the two, at most; and how well the ten nearest neighbours among the attacker's images tell the "
            "test images apart by frozen features. What is near and without a barrier was seen to relearn quickly."
        )
        yield Table(["model", "relative distance", "barrier", "nearest neighbours"], rows)
