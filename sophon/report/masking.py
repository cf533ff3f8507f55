"""How an audit shows gradient masking: what hides in the scale of weights, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sophon.audit.results import Results
from sophon.audit.words import Record, known, printable
from sophon.report.page import Fold, Part, Table
from sophon.report.tables import name

_COMPARED = ("protected", "unprotected", "ratio")
_WEIGHTS = {"norm": "norm of", "rate": "effective rate of"}
_QUANTITIES = {
    "gradient": "gradient",
    "hidden_gradient": "gradient before normalisation",
    "scale_free_gradient": "scale-free gradient",
    "relative_curvature": "relative curvature",
}
# A loss or a gradient so many times that of the unprotected model, or so small a part, is explained.
_EXTREME = 1000.0


def masking(results: Results, measured: Record | None) -> Iterator[Part]:
    """Yield the section's parts; none of an audit that neither measured masking nor ran attacks against it."""
    measured = measured or {}
    if rows := list(_weights(measured)):
        yield (
            "A normalisation hides the scale of the weights before it from the model's function, but not from the "
            "attacker's gradient, which shrinks as they grow: protection that a higher rate or re-normalisation "
            "undoes. Geometric means and extremes of the released weights; the effective rate is 1 / norm²."
        )
        yield Table(["weights before normalisation", "count", *_COMPARED], rows)
    if moments := measured.get("moments"):
        yield (
            "What a mild attacker sees, its head left out. The scale-free gradient sums norm of weight times norm of "
            "gradient over the layers before normalisation; it and the relative curvature do not depend on their "
            "scale. Masking is where the gradient falls and these do not."
        )
        if extreme := extremes(moments):
            yield extreme
        yield _gradients(moments[:1])
        if moments[1:]:
            yield Fold("Later, and from other head starts", [_gradients(moments[1:])])
    if results.undone:
        share = results.masked_share
        yield (
            "Attacks that differ only by surgery which takes scale away. The masked share is the part of the gap "
            "closed that is gone with it." + (f" Its median is {share:.2f}." if known(share) else "")
        )
        rows = [
            [
                *(name(pair.attack), name(pair.without)),
                *map(_two_digits, (pair.gap_closed_without, pair.gap_closed, pair.share)),
            ]
            for pair in results.undone
        ]
        yield Table(["attack", "the same without", "gap closed without", "gap closed", "masked share"], rows, 2)


def extremes(moments: Sequence[Record]) -> str:
    """Explain a loss or a gradient that is out of all proportion to the unprotected model's; "" if none is."""
    for moment in moments:
        for quantity in ("loss", "gradient"):
            found = moment["quantities"].get(quantity) or {}
            p, u, ratio = (found.get(key) for key in _COMPARED)
            if ratio and not 1 / _EXTREME < ratio < _EXTREME:
                when = "before its first step" if not moment["step"] else f"after {moment['step']} steps"
                return (
                    f"These values are no misprint: {when} the attacker's {quantity} is {p:.2g} on the protected "
                    f"model, {u:.2g} on the unprotected one. Weights of very uneven scale cancel in what the model was "
                    "released for, and no longer do once somebody trains it or gives it another head; at ordinary "
                    "rates training then diverges or stands still. An attacker can even the weights out first, which "
                    "the attacks of the family surgery do: what they reach tells what this protection is worth."
                )
    return ""


def _weights(measured: Record) -> Iterator[list[str]]:
    for kind, both in measured.get("weights", {}).items():
        for key, found in both.items():
            if found["ratio"]:
                spreads = (f"{s['mean']:.3g}\n{s['least']:.3g} to {s['most']:.3g}" for s in map(found.get, _COMPARED))
                yield [f"{_WEIGHTS[key]} {kind}", str(found["ratio"]["count"]), *spreads]


def _gradients(moments: Sequence[Record]) -> Table:
    rows = [
        [
            f"{moment['head']} head, {moment['step']} steps",
            _QUANTITIES.get(quantity, printable(quantity)),
            *(_four_digits(found[key]) for key in _COMPARED),
        ]
        for moment in moments
        for quantity, found in moment["quantities"].items()
    ]
    return Table(["attacker", "quantity", *_COMPARED], rows, 2)


def _four_digits(value: Any) -> str:
    return f"{value:.4g}" if known(value) else "-"


def _two_digits(value: float) -> str:
    return f"{value:.2f}" if known(value) else "-"
