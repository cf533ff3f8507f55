"""Audits side by side: what each protection is worth against the same attackers, and whether they were the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from sophon.attacker import FineTuneStrategy
from sophon.audit.results import worst_case
from sophon.audit.verdict import EXPOSURES, Record, format_difference, printable
from sophon.errors import UserError
from sophon.files import read_json, write_text
from sophon.paths import exists
from sophon.report import tables
from sophon.report.document import Document, Figures, Fold, Heat, Note, Part, Section, Table, Terms
from sophon.report.figures import COLOURS, EXPOSURE_WORDS, HUES, dots
from sophon.report.heat import blocks, gap_strength
from sophon.report.masking import masked_share
from sophon.report.single import read_audit

_MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}


@dataclass(frozen=True)
class _Audit:
    """An audit that was read.

    Attributes:
        label: what the comparison calls it; no two the same.
        folder: its run directory.
        summary: its ``audit.json``.
        attacks: entries of the summary's ``attacks`` by name.
        images: a digest of the restricted domain's split hashes; None if they are not known.
    """

    label: str
    folder: Path
    summary: Record
    attacks: Mapping[str, Record]
    images: str | None


def write_comparison(folders: Sequence[Path], out: Path, name: str = "compare") -> Path:
    """Write ``compare.html`` (one self-contained file) and ``compare.md`` into ``out``, atomically.

    Args:
        folders: run directories of at least two audits, in the order in which they are shown.
        out: where to write; made if it is not there.
        name: of both files, without ``.html`` and ``.md``.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: fewer than two folders, or one twice; a folder without an ``audit.json`` that this sophon reads;
            audits that measure different things; or a file that cannot be written.
    """
    document = _document(_read(folders))
    page = out / f"{name}.html"
    write_text(page, document.html())
    write_text(out / f"{name}.md", document.markdown())
    return page


def _read(folders: Sequence[Path]) -> list[_Audit]:
    if len(folders) < 2:
        raise UserError("runs: give the run directories of at least two audits")
    for path, times in Counter(str(folder.resolve()) for folder in folders).items():
        if times > 1:
            raise UserError(f"runs: '{path}' is given {times} times; give each audit once")
    summaries = [read_audit(folder, "runs") for folder in folders]
    for folder, summary in zip(folders, summaries, strict=True):
        if summary["metric"] != summaries[0]["metric"]:
            raise UserError(
                f"runs: '{folder}' measures {tables.metric_name(summary)} and '{folders[0]}' "
                f"{tables.metric_name(summaries[0])}; give audits with the same metric"
            )
    return [
        _Audit(label, folder, summary, {attack["attack"]: attack for attack in summary["attacks"]}, images)
        for label, folder, summary, images in zip(
            _labels(folders, summaries), folders, summaries, map(_images, folders, summaries), strict=True
        )
    ]


def _labels(folders: Sequence[Path], summaries: Sequence[Record]) -> list[str]:
    """Call each audit by its run's name and seed; where another is called the same, by its domain or its folder too."""
    labels = []
    for folder, summary in zip(folders, summaries, strict=True):
        config = summary["config"] or {}
        name = config.get("name") or (summary["checkpoint"] or {}).get("name") or str(folder)
        labels.append(f"{name}, seed {config['seed']}" if "seed" in config else str(name))
    times = Counter(labels)
    domains = [(summary.get("domains") or {}).get("restricted") for summary in summaries]
    by_domain = Counter(zip(labels, domains, strict=True))
    more = domains if max(by_domain.values()) == 1 else folders
    return [
        printable(label if times[label] == 1 else f"{label} ({each})") for label, each in zip(labels, more, strict=True)
    ]


def _images(folder: Path, summary: Record) -> str | None:
    """Return a digest of the restricted domain's hashes: from ``audit.json``, or where that is older, ``run.json``."""
    hashes = (summary.get("hashes") or {}).get("restricted")
    if not hashes and exists(folder / "run.json"):
        hashes = (read_json(folder / "run.json").get("identity") or {}).get("restricted")
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:8] if hashes else None


def _shared(audits: Sequence[_Audit]) -> list[str]:
    """Return the attacks that all audits ran, those that get through most on average first."""
    names = set.intersection(*(set(audit.attacks) for audit in audits))

    def order(name: str) -> tuple[float, str]:
        gaps = [audit.attacks[name]["gap_closed"]["value"] for audit in audits]
        known = [gap for gap in gaps if gap is not None]
        return (sum(known) / len(known) if known else float("inf"), name)

    return sorted(names, key=order)


def _document(audits: Sequence[_Audit]) -> Document:
    shared = _shared(audits)
    everything = set.union(*(set(audit.attacks) for audit in audits))
    sections = [
        Section("audits", "Audits", [_audits_table(audits, shared), Terms(_verdicts(audits))]),
        Section("families", "Worst cases by family", _families(audits)),
        Section("attacks", "Gap closed, attack by attack", _attack_map(audits, shared)),
        Section("values", "What the attacked models reach", _values(audits, shared)),
        Section("sources", "Checkpoints and attacks", _sources(audits, everything - set(shared))),
    ]
    return Document(
        title="Comparison of audits",
        lead=f"{len(audits)} audits; {len(shared)} of {len(everything)} attacks were run in all of them.",
        notes=[
            Note(
                "Gap closed is 0 for no protection and 1 for no better a start than scratch; a worst case gives each "
                "model its best attack."
            ),
            *(Note(text, warning=True) for text in differences(audits, shared)),
        ],
        sections=[section for section in sections if section.parts],
    )


def differences(audits: Sequence[_Audit], shared: Sequence[str]) -> list[str]:
    """Say in what the audits differ, so that they do not compare like with like; empty if in nothing that is known."""
    found = []

    def differ(what: str, fact: Callable[[_Audit], Any]) -> None:
        facts = {audit.label: fact(audit) for audit in audits}
        if len({json.dumps(value, sort_keys=True) for value in facts.values()}) > 1:
            told = "; ".join(f"{label}: {_told(value)}" for label, value in facts.items())
            found.append(printable(f"{what} ({told})."))

    differ("The images of the restricted domain are not the same, by their hashes", lambda a: a.images)
    if all(audit.images is None for audit in audits):
        found.append("It is not known whether the images of the restricted domain are the same: no audit has hashes.")
    differ("The unprotected models are not the same", lambda a: (a.summary.get("reference") or {}).get("sha256"))
    differ("The seeds of the audits are not the same", lambda a: _config(a).get("seed"))
    differ("The attempts of each attack are not as many", lambda audit: _attack_config(audit).get("seeds"))
    differ("The points of each curve are not as many", lambda audit: _attack_config(audit).get("eval_points"))
    differ("Results are not measured alike", lambda a: _config(a).get("task"))
    if len({frozenset(audit.attacks) for audit in audits}) > 1:
        counts = "; ".join(f"{audit.label}: {len(audit.attacks)}" for audit in audits)
        found.append(f"Not the same attacks were tried, and worst cases are of those that were ({counts}).")
    unlike = [name for name in shared if len({_budget(audit, name) for audit in audits}) > 1]
    if unlike:
        found.append(printable(f"Attacks of the same name are not the same: {', '.join(unlike)}."))
    return found


def _told(value: Any) -> str:
    if value is None:
        return "not known"
    return value[:8] if isinstance(value, str) else str(value)


def _config(audit: _Audit) -> Record:
    return audit.summary["config"] or {}


def _attack_config(audit: _Audit) -> Record:
    return _config(audit).get("attack") or {}


def _budget(audit: _Audit, name: str) -> str:
    """Return what decides how strong an attack is: its strategy, or of a search, whose winners differ, its budget."""
    attack = audit.attacks[name]
    searches = {search["name"]: search for search in audit.summary.get("searches") or ()}
    if name in searches:
        facts: Any = {key: searches[name].get(key) for key in ("sampler", "trials", "steps")}
    else:  # strategies may have been stored before some of the fields were there
        facts = {**FineTuneStrategy().plain(), **attack["strategy"]}
    return json.dumps(facts, sort_keys=True)


def _worst(group: Record | None) -> str:
    return tables.gap_lines(group["gap_closed"]) if group else "-"


def _audits_table(audits: Sequence[_Audit], shared: Sequence[str]) -> Table:
    rows = []
    for audit in audits:
        summary = audit.summary
        intactness, harm = summary["intactness"], (summary.get("benign") or {}).get("worst_harm")
        rows.append(
            [
                tables.name(audit.label),
                printable(str((summary["checkpoint"] or {}).get("method") or "-")),
                format_difference(intactness["loss"], intactness) if intactness else "-",
                _worst(worst_case([audit.attacks[name] for name in shared], summary["metric"])),
                *(_worst(summary["worst_case"].get(group)) for group in ("overall", *EXPOSURES)),
                format_difference(harm["value"], summary["metric"]) if harm else "-",
                masked_share(summary),
            ]
        )
    groups = ["shared attacks", "all attacks", *EXPOSURE_WORDS.values()]
    head = ["audit", "method", "intactness loss", *(f"gap closed, {group}" for group in groups), "harm to benign use"]
    return Table([*head, "masked share"], rows, 2)


def _verdicts(audits: Sequence[_Audit]) -> dict[str, str]:
    return {audit.label: printable(audit.summary["verdict"]) for audit in audits}


def _map(audits: Sequence[_Audit], rows: Mapping[str, Sequence[float | None]], first: str, caption: str) -> Heat:
    cells = [
        (name, [("-" if value is None else f"{value:.2f}", gap_strength(value)) for value in values])
        for name, values in rows.items()
    ]
    labels = [audit.label for audit in audits]
    return Heat([first, *labels], blocks({caption: cells}), ("holds", "no protection"), markdown_too=True)


def _families(audits: Sequence[_Audit]) -> list[Part]:
    names = dict.fromkeys(
        name for a in audits for name, group in (a.summary.get("families") or {}).items() if group is not None
    )
    rows = {
        printable(name): [
            ((audit.summary.get("families") or {}).get(name) or {"gap_closed": {"value": None}})["gap_closed"]["value"]
            for audit in audits
        ]
        for name in names
    }
    if not rows:
        return []
    note = "Gap closed in the worst case of each family; a family may hold other attacks in another audit."
    return [Note(note), _map(audits, rows, "family", "worst case")]


def _attack_map(audits: Sequence[_Audit], shared: Sequence[str]) -> list[Part]:
    if not shared:
        return [Note("No attack was run in all of these audits.")]
    rows = {printable(name): [audit.attacks[name]["gap_closed"]["value"] for audit in audits] for name in shared}
    note = (
        "Attacks that all audits ran; those that get through most come first. The stronger the colour, the less holds."
    )
    return [Note(note), _map(audits, rows, "attack", "shared attacks")]


def _values(audits: Sequence[_Audit], shared: Sequence[str]) -> list[Part]:
    lines = [(name, {a.label: a.attacks[name]["roles"].get("protected") for a in audits}) for name in shared]
    metric = audits[0].summary["metric"]
    if not any(score and score["mean"] is not None for _, scores in lines for score in scores.values()):
        return []
    marks = list(_MARKS)
    series = {
        audit.label: (COLOURS[HUES[index % len(HUES)]], marks[index % len(marks)]) for index, audit in enumerate(audits)
    }
    legend = [
        (HUES[index % len(HUES)], f"{_MARKS[marks[index % len(marks)]]} {audit.label}")
        for index, audit in enumerate(audits)
    ]
    sheets = dots(lines, series, metric, "after shared attacks, by audit", apart=min(0.14, 0.8 / len(audits)))
    better = "higher" if metric["higher_is_better"] else "lower"
    note = (
        f"{tables.metric_name(audits[0].summary)} of the protected models on the restricted domain's test split, with "
        f"95 % intervals over seeds; {better} is better for the attacker."
    )
    return [Note(note[:1].upper() + note[1:]), Figures([*map(Markup, sheets)], (), "large", legend)]


def _sources(audits: Sequence[_Audit], unshared: set[str]) -> list[Part]:
    rows = []
    for audit in audits:
        checkpoint = audit.summary["checkpoint"] or {}
        path, sha256 = (printable(str(checkpoint.get(key) or "-")) for key in ("path", "sha256"))
        rows.append([tables.name(audit.label), f"{path}\nsha256 {sha256}", printable(str(audit.folder))])
    parts: list[Part] = [Table(["audit", "checkpoint", "run directory"], rows, 3)]
    if unshared:
        ran = [
            [tables.name(name), ", ".join(audit.label for audit in audits if name in audit.attacks)]
            for name in sorted(unshared)
        ]
        parts.append(Fold(f"{len(ran)} attacks that not all of the audits ran", [Table(["attack", "run in"], ran, 2)]))
    return parts
