"""The audit for people: a table for the terminal, a Markdown report, one HTML page, and the curves as Parquet."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sophon.audit.figures import EXPOSURE_WORDS, curve_panels, dot_plot, printable
from sophon.audit.gallery import shot, strips
from sophon.audit.verdict import EXPOSURES, ROLES, Record, format_difference, format_value
from sophon.runs import write_bytes, write_text

_COLUMNS = ["attack", "role", "seed", "step", "select", "exposure"]
# Left to right from what the attacker has without us to what is left to it.
_SHOWN_ROLES = ROLES[::-1]
_OVERHEAD_LEVEL = "80"
_LEGEND = """\
Mean test metric ± half width of the 95 % confidence interval over seeds. Gap closed with its bootstrap interval: 0 is
no protection, 1 is no better a start than scratch. Curves: `report.html`, `curves.parquet`. All else: `audit.json`."""
_FRECHET = "Frechet distance"
_PLAIN = {"unit": ""}
_REPEAT = ("checkpoint", "reference", "domains", "support", "config", "packages", "thresholds")


def curves_frame(attempts: Sequence[Record]) -> pd.DataFrame:
    """Return every point of every curve as a row, sorted.

    Returns:
        Columns ``attack``, ``role``, ``seed`` (int64), ``step`` (int64), ``select`` (float64, the metric on the
        attacker's ``select`` split, NaN where it was not finite) and ``exposure``.
    """
    rows = [
        (attempt["attack"], attempt["role"], attempt["seed"], point["step"], point["select"], attempt["exposure"])
        for attempt in attempts
        for point in attempt["curve"]
    ]
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    frame = frame.astype({"seed": "int64", "step": "int64", "select": "float64"})
    return frame.sort_values(_COLUMNS, ignore_index=True)


def write_curves(run_dir: Path, attempts: Sequence[Record]) -> None:
    """Write `curves_frame` to ``curves.parquet``, atomically."""
    buffer = io.BytesIO()
    curves_frame(attempts).to_parquet(buffer, index=False)
    write_bytes(run_dir / "curves.parquet", buffer.getvalue())


def _number(value: float | None, metric: Record) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if metric["unit"] == "%" else f"{value:.4g}"


def _score(score: Record | None, metric: Record) -> str:
    if not score:
        return "-"
    text = _number(score["mean"], metric)
    if score["ci95"] is not None:
        text += f" ± {_number(score['ci95'], metric)}"
    return f"{text} ({score['failed']} failed)" if score["failed"] else text


def _gap(gap: Record) -> str:
    if gap["value"] is None:
        return "-"
    return f"{gap['value']:.2f}" + (" [{:.2f}, {:.2f}]".format(*gap["ci95"]) if gap["ci95"] else "")


def _exposure(attack: Record) -> str:
    return EXPOSURE_WORDS[attack["exposure"]] + (f": {', '.join(attack['outside'])}" if attack["outside"] else "")


def _overhead(attack: Record) -> str:
    level = (attack["overhead"] or {}).get(_OVERHEAD_LEVEL)
    if not level:
        return "-"
    steps = level["steps"]
    return f"> {steps['at_least']:.2g}" if steps["ratio"] is None else f"{steps['ratio']:.2g}"


def _rows(summary: Record) -> list[dict[str, Any]]:
    metric = summary["metric"]
    return [
        {
            "attack": printable(attack["attack"]),
            "exposure": printable(_exposure(attack)),
            **{role: _score(attack["roles"].get(role), metric) for role in ROLES},
            "gap": _gap(attack["gap_closed"]),
            "reason": attack["gap_closed"]["reason"],
            "overhead": _overhead(attack),
            "sgrc": "-" if attack["sgrc"] is None else f"{attack['sgrc']:.1f} %",
            "area": _number(attack["signed_area"], metric),
        }
        for attack in summary["attacks"]
    ]


def table(summary: Record) -> str:
    """Return the attacks as a Markdown table that also reads well in a terminal.

    Args:
        summary: what `sophon.audit.metrics.summarise` returned.

    Returns:
        Lines without a final newline: attack, exposure, the mean test metric of each role with the half width of its
        95 % interval, gap closed with its interval.
    """
    unit = f" ({summary['metric']['unit']})" if summary["metric"]["unit"] else ""
    lines = [["attack", "exposure", *(f"{role}{unit}" for role in _SHOWN_ROLES), "gap closed"]]
    for row in _rows(summary):
        exposure = _markdown(row["exposure"])
        lines.append([_code(row["attack"]), exposure, *(row[role] for role in _SHOWN_ROLES), row["gap"]])
    return _aligned(lines)


def _aligned(lines: list[list[str]]) -> str:
    """Lay out a Markdown table, the first line its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", r"\|") + "`"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", printable(text))


def _further(summary: Record) -> dict[str, dict[str, list[str]]]:
    """Return the further measurements by attack and name: each role's mean, in the order of `_SHOWN_ROLES`."""
    tables = {}
    for attack in summary["attacks"]:
        details = [(attack["roles"].get(role) or {}).get("details") or {} for role in _SHOWN_ROLES]
        names = dict.fromkeys(name for found in details for name in found)
        if names:
            tables[printable(attack["attack"])] = {
                printable(name): [_number(found.get(name), _PLAIN) for found in details] for name in names
            }
    return tables


def _further_note(summary: Record) -> str:
    note = "Means over the attempts that succeeded, on the restricted domain's test split."
    if any(_FRECHET in rows for rows in _further(summary).values()):
        network = summary.get("feature_network") or "a network that the audit does not name"
        note += (
            f" {_FRECHET}: from the images that the attacked model generates to those of that split, lower is closer; "
            f"features: {printable(network)}."
        )
    return note


def _headlines(summary: Record) -> list[dict[str, str]]:
    """Return title, value, detail (loss or interval) and note of the few numbers that come first."""
    intactness, metric = summary["intactness"], summary["metric"]
    cards = []
    if intactness:
        before, after = (format_value(intactness[key], intactness) for key in ("before", "after"))
        loss = format_difference(intactness["loss"], intactness)
        detail = f"loss {loss}, from {before}"
        cards.append({"title": "Intactness", "value": after, "detail": detail, "note": "on the original domain"})
    for exposure in ("overall", *EXPOSURES):
        group = summary["worst_case"][exposure]
        card = {
            "title": f"Gap closed, {EXPOSURE_WORDS.get(exposure, exposure)}",
            "value": "-",
            "detail": "",
            "note": "not attacked",
        }
        if group:
            best = group["roles"].get("protected")
            gap, note = group["gap_closed"], f"worst of {group['attacks']}"
            if best:
                note += f": {printable(best['attack'])} reaches {format_value(best['mean'], metric)}"
            value, _, interval = _gap(gap).partition(" ")
            card |= {"value": value, "detail": interval, "note": f"{note}; {gap['reason']}" if gap["reason"] else note}
        cards.append(card)
    return cards


def _title(summary: Record) -> str:
    return printable(f"Audit of {(summary['checkpoint'] or {}).get('name') or 'a checkpoint'}")


def _repeat(summary: Record) -> dict[str, str]:
    return {key: json.dumps(summary[key], indent=2, sort_keys=True) for key in _REPEAT if summary[key] is not None}


def _markdown_report(summary: Record) -> str:
    parts = [f"# {_markdown(_title(summary))}", f"**{_markdown(summary['verdict'])}**"]
    parts += [
        "\n".join(
            f"- {card['title']}: {card['value']} {_markdown(card['detail'])} ({_markdown(card['note'])})"
            for card in _headlines(summary)
        )
    ]
    parts += [table(summary)]
    parts += [_LEGEND]
    if further := _further(summary):
        lines = [["attack", "measurement", *_SHOWN_ROLES]]
        lines += [
            [_code(attack), _markdown(name), *values]
            for attack, rows in further.items()
            for name, values in rows.items()
        ]
        parts += ["## Further measurements", _markdown(_further_note(summary)), _aligned(lines)]
    parts += [f"## {key.capitalize()}\n\n```json\n{text}\n```" for key, text in _repeat(summary).items()]
    return "\n\n".join(parts) + "\n"


def _pictures(run_dir: Path, summary: Record, attempts: Sequence[Record]) -> dict[str, Any]:
    """Return what the page shows of generated images."""
    names = [attack["attack"] for attack in summary["attacks"]]
    return {
        "gallery": [shot(run_dir, entry["file"], entry["title"]) for entry in summary.get("gallery") or ()],
        "strips": {printable(name): strip for name, strip in strips(run_dir, attempts, names, _SHOWN_ROLES).items()},
    }


def _html_report(run_dir: Path, summary: Record, attempts: Sequence[Record]) -> str:
    environment = Environment(
        loader=PackageLoader("sophon.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    panels = curve_panels(attempts, [attack["attack"] for attack in summary["attacks"]], summary["metric"])
    return environment.get_template("report.html.j2").render(
        title=_title(summary),
        verdict=printable(summary["verdict"]),
        headlines=_headlines(summary),
        metric=summary["metric"],
        roles=_SHOWN_ROLES,
        rows=_rows(summary),
        overhead_level=_OVERHEAD_LEVEL,
        # ElementTree wrote these, escaping every text and attribute.
        dots=Markup(dot_plot(summary["attacks"], summary["metric"])),
        panels={printable(name): Markup(svg) for name, svg in panels.items()},
        further=_further(summary),
        further_note=_further_note(summary),
        **_pictures(run_dir, summary, attempts),
        strategies={printable(attack["attack"]): _strategy(attack["strategy"]) for attack in summary["attacks"]},
        repeat=_repeat(summary),
        attempts=summary["attempts"],
        seconds=summary["seconds_total"],
    )


def _strategy(strategy: Mapping[str, Any]) -> str:
    return printable(", ".join(f"{key} {value}" for key, value in strategy.items()))


def write_reports(run_dir: Path, summary: Record, attempts: Sequence[Record]) -> None:
    """Write ``report.html`` (one self-contained file) and ``report.md``, atomically.

    Args:
        run_dir: the audit's folder; pictures that it lacks are named in the page instead of shown.
        summary: what `sophon.audit.metrics.summarise` returned, or ``audit.json``.
        attempts: the stored attempts, for the curves and the pictures.

    Raises:
        UserError: a file cannot be written.
    """
    write_text(run_dir / "report.html", _html_report(run_dir, summary, attempts))
    write_text(run_dir / "report.md", _markdown_report(summary))
