"""Compare an audit with the thresholds of ``gate.*``."""

from __future__ import annotations

from sophon.auditing.gap_closed import Gap, Judgement
from sophon.auditing.summary import AuditReport
from sophon.auditing.verdict import format_gap
from sophon.config import GateConfig


def failures(gate: GateConfig, audit: AuditReport) -> list[str]:
    """Return a phrase for each value of the gate that an audit does not come to; empty if it passes."""
    worst = audit.results.worst_case.get("overall")
    gap, removal = (worst.deciding.gap_closed, worst.removal) if worst else (None, None)
    attack = worst.deciding.attacks.get("protected", "no attack") if worst else ""
    phrases = [
        _at_least("worst_case", gate.worst_case, gap, f"gap closed of '{attack}',", "no attack was tried"),
        _at_least("removal", gate.removal, removal, "R", "no filtered model was attacked; give filtered=[DIR]"),
        _intactness(gate.intactness, audit),
    ]
    return [phrase for phrase in phrases if phrase]


def _at_least(key: str, least: float | None, gap: Gap | None, what: str, missing: str) -> str:
    if least is None:
        return ""
    if gap is None:
        return f"gate.{key}: {missing}"
    if gap.state == Judgement.UNKNOWN:
        return f"gate.{key}: {what} {format_gap(gap)}, cannot be judged"
    return "" if gap.value >= least else f"gate.{key}: {what} {format_gap(gap)}, is below {least:g}"


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
