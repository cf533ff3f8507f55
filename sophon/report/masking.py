"""How an audit shows gradient masking: what hides in the scale of weights, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sophon.audit.verdict import Record, printable
from sophon.report import tables
from sophon.report.document import Fold, Note, Part, Table

_COMPARED = ("protected", "unprotected", "ratio")
_WEIGHTS = {"norm": "norm of", "rate": "effective rate of"}
_QUANTITIES = {
    "gradient": "gradient",
    "hidden_gradient": "gradient before normalisation",
    "scale_free_gradient": "scale-free gradient",
    "relative_curvature": "relative curvature",
}
_PAIR = {"gap_closed_without": "gap closed without", "gap_closed": "gap closed", "share": "masked share"}


def masking(summary: Record) -> Iterator[Part]:
    """Yield the section's parts; none of an audit that neither measured masking nor ran attacks against it."""
    found = summary.get("masking") or {}  # older audits have none
    measured = found.get("measured") or {}
    if weights := _weights_table(measured):
        yield Note(
            "A normalisation hides the scale of the weights before it from the model's function, but not from the "
            "attacker's gradient, which shrinks as they grow: protection that a higher rate or re-normalisation "
            "undoes. Geometric means and extremes of the released weights; the effective rate is 1 / norm²."
        )
        yield weights
    if moments := measured.get("moments"):
        yield Note(
            "What a mild attacker sees, its head left out. The scale-free gradient sums norm of weight times norm of "
            "gradient over the layers before normalisation; it and the relative curvature do not depend on their "
            "scale. Masking is where the gradient falls and these do not."
        )
        yield _gradients_table(moments[:1])
        if moments[1:]:
            yield Fold("Later, and from other head starts", [_gradients_table(moments[1:])])
    if pairs := found.get("pairs"):
        median = "" if found["share"] is None else f" Its median is {found['share']:.2f}."
        yield Note(
            "Attacks that differ only by surgery which takes scale away. The masked share is the part of the gap "
            f"closed that is gone with it.{median}"
        )
        yield _undone_table(pairs)


def masked_share(summary: Record) -> str:
    """Write the share of protection that is masking, and below it how much larger the weights are where it hides."""
    found = summary.get("masking") or {}
    share = found.get("share")
    text = "-" if share is None else f"{share:.2f}"
    ratio = found["measured"]["weights"]["layers"]["norm"]["ratio"] if found.get("measured") else None
    return f"{text}\nweights {ratio['mean']:.3g} times as large" if ratio else text


def _weights_table(measured: Record) -> Table | None:
    rows = [
        [f"{title} {kind}", str(found["ratio"]["count"]), *(_spread(found[key]) for key in _COMPARED)]
        for kind, both in measured.get("weights", {}).items()
        for title, found in ((_WEIGHTS[key], found) for key, found in both.items())
        if found["ratio"]
    ]
    return Table(["weights before normalisation", "count", *_COMPARED], rows) if rows else None


def _spread(found: Record) -> str:
    return f"{found['mean']:.3g}\n{found['least']:.3g} to {found['most']:.3g}"


def _gradients_table(moments: Sequence[Record]) -> Table:
    rows = [
        [
            f"{moment['head']} head, {moment['step']} steps",
            _QUANTITIES.get(quantity, printable(quantity)),
            *(_number(found[key]) for key in _COMPARED),
        ]
        for moment in moments
        for quantity, found in moment["quantities"].items()
    ]
    return Table(["attacker", "quantity", *_COMPARED], rows, 2)


def _undone_table(pairs: Sequence[Record]) -> Table:
    rows = [
        [tables.name(pair["attack"]), tables.name(pair["without"]), *(_gap(pair[key]) for key in _PAIR)]
        for pair in pairs
    ]
    return Table(["attack", "the same without", *_PAIR.values()], rows, 2)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _gap(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
