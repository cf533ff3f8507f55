"""What a model card says of an audit."""

from __future__ import annotations

import math
from typing import Any

from sophon.auditing.summary import AuditReport
from sophon.auditing.verdict import format_gap


def facts(audit: AuditReport) -> dict[str, Any]:
    """Return what a model card says of an audit, as plain data: words, and the figures of the attack that decides.

    ``attack`` is the worst case's, ``value`` what it gets out of the protected model on the restricted domain's test
    split, ``gap_closed`` its score, ``removal`` R; they are None where they are not known.
    """
    verdict, metric = audit.verdict, audit.results.metric
    worst = audit.results.worst_case.get("overall")
    deciding = worst.deciding if worst else None
    value, gap = math.nan, math.nan
    if deciding and "protected" in deciding.roles:
        value, gap = deciding.roles["protected"].mean, deciding.gap_closed.value
    return {
        "date": audit.context.date,
        "sophon": audit.context.packages.get("sophon"),
        "restricted": audit.context.domains.get("restricted"),
        "word": str(verdict.word),
        "sentence": verdict.sentence,
        "knowing": verdict.knowing,
        "basis": verdict.basis,
        "findings": list(verdict.findings),
        "attack": deciding.attacks.get("protected") if deciding else None,
        "metric": metric.name,
        "value": value if math.isfinite(value) else None,
        "gap_closed": gap if math.isfinite(gap) else None,
        "gap_in_words": format_gap(deciding.gap_closed) if deciding else None,
        "removal": worst.removal.value if worst and worst.removal and math.isfinite(worst.removal.value) else None,
    }
