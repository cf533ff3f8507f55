"""What was asked of an audit, and what it came to."""

from __future__ import annotations

from sophon.auditing.scores import State
from sophon.auditing.summary import AuditReport
from sophon.auditing.verdict import format_gap
from sophon.config import GateConfig


def failures(gate: GateConfig, audit: AuditReport) -> list[str]:
    """Return a phrase for each value of the gate that an audit does not come to; empty if it passes."""
    found = [
        _worst_case(gate.worst_case, audit),
        _removal(gate.removal, audit),
        _intactness(gate.intactness, audit),
    ]
    return [each for each in found if each]


def _worst_case(least: float | None, audit: AuditReport) -> str:
    if least is None:
        return ""
    worst = audit.results.worst_case.get("overall")
    if worst is None:
        return "gate.worst_case: no attack was tried"
    gap, attack = worst.deciding.gap_closed, worst.deciding.attacks.get("protected", "no attack")
    if gap.value >= least and worst.state != State.UNKNOWN:
        return ""
    why = "cannot be judged" if worst.state == State.UNKNOWN else f"is below {least:g}"
    return f"gate.worst_case: gap closed {format_gap(gap)} of '{attack}' {why}"


def _removal(least: float | None, audit: AuditReport) -> str:
    if least is None:
        return ""
    worst = audit.results.worst_case.get("overall")
    if worst is None or worst.removal is None:
        return "gate.removal: no filtered model was attacked; give filtered=[DIR]"
    if worst.removal.value >= least and worst.removal.state != State.UNKNOWN:
        return ""
    why = "cannot be judged" if worst.removal.state == State.UNKNOWN else f"is below {least:g}"
    return f"gate.removal: R {format_gap(worst.removal, str(audit.results.best_filtered))} {why}"


def _intactness(most: float | None, audit: AuditReport) -> str:
    if most is None:
        return ""
    kept = audit.context.intactness
    if kept is None:
        return "gate.intactness: intactness was not measured"
    points = kept.metric.unit == "%"
    loss = kept.loss.value if points else 100 * kept.loss.value / abs(kept.before)
    if loss <= most:
        return ""
    return f"gate.intactness: the original domain loses {loss:.2f} {'points' if points else '%'}, more than {most:g}"
