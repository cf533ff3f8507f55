"""How an audit shows gradient masking: what hides in the scale of weights, and what it is worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sophon.auditing.masking import Masking, Seen
from sophon.auditing.results import Results
from sophon.auditing.words import known
from sophon.report.page import Element, Table
from sophon.report.tables import name

_QUANTITIES = {
    "gradient": "gradient",
    "hidden_gradient": "gradient before normalisation",
    "scale_free_gradient": "scale-free gradient",
}
# A loss or a gradient so many times that of the unprotected model, or so small a part, is explained.
_EXTREME = 1000.0


def masking(results: Results, measured: Masking | None) -> Iterator[Element]:
    """Yield the section's parts; none of an audit that neither measured masking nor ran attacks against it."""
    if measured and measured.norms:
        yield (
            "A normalisation hides the scale of the weights before it from the model's function, but not from the "
            "attacker's gradient, which shrinks as they grow: protection that a higher rate or re-normalisation "
            "undoes. How many times as large the released weights are; at twice the norm a quarter of the rate is left."
        )
        rows = [[norms.of, str(norms.count), *(f"{v:.3g}" for v in (norms.mean, norms.least, norms.most))]
                for norms in measured.norms]  # fmt: skip
        yield Table(["weights before normalisation", "count", "geometric mean", "least", "most"], rows)
    if measured and measured.seen:
        yield (
            "What an attacker sees before its first step, its head left out. The scale-free gradient sums norm of "
            "weight times norm of gradient over the layers before normalisation, and does not depend on their scale. "
            "Masking is where the gradient falls and this does not."
        )
        if explained := extreme(measured.seen):
            yield explained
        yield _seen(measured.seen)
    if results.undone:
        share = results.masked_share
        yield (
            "Attacks that differ only by surgery which takes scale away. The masked share is the part of the gap "
            "closed that is gone with it." + (f" Its median is {share:.2f}." if known(share) else "")
        )
        rows = [
            [
                *(name(pair.attack), name(pair.without)),
                *(f"{v:.2f}" if known(v) else "-" for v in (pair.gap_closed_without, pair.gap_closed, pair.share)),
            ]
            for pair in results.undone
        ]
        yield Table(["attack", "the same without", "gap closed without", "gap closed", "masked share"], rows, 2)


def extreme(seen: Sequence[Seen]) -> str:
    """Explain a loss or a gradient that is out of all proportion to the unprotected model's; "" if none is."""
    for row in seen:
        if row.quantity in ("loss", "gradient") and known(row.ratio) and not 1 / _EXTREME < row.ratio < _EXTREME:
            return (
                f"These values are no misprint: the attacker's {row.quantity} is {row.protected:.2g} on the protected "
                f"model, {row.unprotected:.2g} on the unprotected one. Weights of very uneven scale cancel in what the "
                "model was released for, and no longer do once somebody trains it or gives it another head. An "
                "attacker can even the weights out first, which the attacks of the family surgery do."
            )
    return ""


def _seen(seen: Sequence[Seen]) -> Table:
    rows = [
        [
            *(f"{row.head} head", _QUANTITIES.get(row.quantity, row.quantity)),
            *(f"{v:.4g}" if known(v) else "-" for v in (row.protected, row.unprotected, row.ratio)),
        ]
        for row in seen
    ]
    return Table(["attacker", "quantity", "protected", "unprotected", "ratio"], rows, 2)
