"""Audits side by side: what each protection is worth against the same attackers, and whether they were the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from sophon.auditing.attack_scores import Attack
from sophon.auditing.results import Results
from sophon.auditing.scores import Score
from sophon.auditing.summary import AuditReport
from sophon.auditing.words import format_difference, known, printable
from sophon.auditing.worst_case import WorstCase, worst_case
from sophon.errors import UserError
from sophon.files import write_text
from sophon.held_out import EXPOSURE_WORDS, EXPOSURES
from sophon.report import tables
from sophon.report.drawing import COLOURS, HUES
from sophon.report.figures import dots
from sophon.report.page import Drawings, Element, Fold, Link, Page, Section, Table, Warn
from sophon.report.terms import TERMS

_MARKS = {"o": "●", "s": "■", "D": "◆", "^": "▲", "v": "▼"}


@dataclass(frozen=True)
class _Compared:
    """An audit with what the comparison calls it (no two the same), its run directory, and its attacks by name."""

    label: str
    folder: Path
    report: AuditReport
    attacks: Mapping[str, Attack]


def write_comparison(folders: Sequence[Path], out: Path, name: str = "compare") -> Path:
    """Write ``compare.html`` (one self-contained file) and ``compare.md`` into ``out``, atomically.

    Args:
        folders: run directories of at least two audits, in the order in which they are shown.
        name: of both files, without ``.html`` and ``.md``.

    Returns:
        The path of the HTML file.

    Raises:
        UserError: fewer than two folders, or one twice; a folder without an audit that this sophon reads; audits that
            measure different things; or a file that cannot be written.
    """
    page = _page(_read(folders), out)
    path = out / f"{name}.html"
    write_text(path, page.html())
    write_text(out / f"{name}.md", page.markdown())
    return path


def _read(folders: Sequence[Path]) -> list[_Compared]:
    if len(folders) < 2:
        raise UserError("runs: give the run directories of at least two audits")
    for path, times in Counter(str(folder.resolve()) for folder in folders).items():
        if times > 1:
            raise UserError(f"runs: '{path}' is given {times} times; give each audit once")
    audits = [AuditReport.read(folder, "runs") for folder in folders]
    for folder, audit in zip(folders, audits, strict=True):
        if audit.results.metric != audits[0].results.metric:
            raise UserError(
                f"runs: '{folder}' measures {tables.metric_name(audit.results.metric)} and '{folders[0]}' "
                f"{tables.metric_name(audits[0].results.metric)}; give audits with the same metric"
            )
    return [
        _Compared(label, folder, audit, {attack.attack: attack for attack in audit.results.attacks})
        for label, folder, audit in zip(_labels(folders, audits), folders, audits, strict=True)
    ]


def _labels(folders: Sequence[Path], audits: Sequence[AuditReport]) -> list[str]:
    """Call each audit by its run's name and seed; where another is called the same, by its domain or its folder too."""
    labels = []
    for folder, audit in zip(folders, audits, strict=True):
        config = audit.context.config
        name = config.get("name") or audit.context.checkpoint.get("name") or str(folder)
        labels.append(f"{name}, seed {config['seed']}" if "seed" in config else str(name))
    times = Counter(labels)
    domains = [audit.context.domains.get("restricted") for audit in audits]
    by_domain = Counter(zip(labels, domains, strict=True))
    more = domains if max(by_domain.values()) == 1 else folders
    return [
        printable(label if times[label] == 1 else f"{label} ({detail})")
        for label, detail in zip(labels, more, strict=True)
    ]


def _page(audits: Sequence[_Compared], out: Path) -> Page:
    attacks = set.union(*(set(audit.attacks) for audit in audits))
    shared = _shared(audits)
    verdicts = [[_link(audit, out), printable(str(audit.report.verdict))] for audit in audits]
    sections = [
        Section("audits", "Audits", [_audits_table(audits, shared), Table(["audit", "verdict"], verdicts, 2)]),
        Section("families", "Worst cases by family", list(_families(audits))),
        Section("attacks", "Gap closed, attack by attack", list(_attack_map(audits, shared))),
        Section("values", "What the attacked models reach", list(_values(audits, shared))),
        Section("sources", "Checkpoints and attacks", list(_sources(audits, attacks - set(shared)))),
    ]
    return Page(
        title="Comparison of audits",
        lead=f"{len(audits)} audits; {len(shared)} of {len(attacks)} attacks were run in all of them.",
        notes=[Warn(text) for text in differences(audits, shared)],
        sections=sections,
        terms={term: TERMS[term] for term in ("gap closed", "R", "reading", "judged", "masked share", "intervals")},
    )


def _link(audit: _Compared, out: Path) -> Link:
    """Return an audit's name, which leads to its own report."""
    return Link(audit.label, quote(os.path.relpath(audit.folder / "report.html", out)))


def _shared(audits: Sequence[_Compared]) -> list[str]:
    """Return the attacks that all audits ran, those that get through most on average first."""

    def order(name: str) -> tuple[float, str]:
        gaps = [audit.attacks[name].gap_closed.value for audit in audits]
        values = [gap for gap in gaps if known(gap)]
        return (sum(values) / len(values) if values else math.inf, name)

    return sorted(set.intersection(*(set(audit.attacks) for audit in audits)), key=order)


def differences(audits: Sequence[_Compared], shared: Sequence[str]) -> list[str]:
    """Say in what the audits differ, so that they do not compare like with like; empty if in nothing that is known."""
    texts = []

    def differ(what: str, fact: Callable[[AuditReport], Any]) -> None:
        facts = {audit.label: fact(audit.report) for audit in audits}
        if len({json.dumps(value, sort_keys=True) for value in facts.values()}) > 1:
            values = "; ".join(f"{label}: {_told(value)}" for label, value in facts.items())
            texts.append(printable(f"{what} ({values})."))

    differ("The images of the restricted domain are not the same, by their hashes", lambda a: _digest(a.context.hashes))
    if not any(audit.report.context.hashes for audit in audits):
        texts.append("It is not known whether the images of the restricted domain are the same: no audit has hashes.")
    differ("The unprotected models are not the same", lambda a: a.context.reference.get("sha256"))
    differ(
        "The filtered models are not the same",
        lambda a: {role: origin["sha256"][:8] for role, origin in a.context.filtered.items()},
    )
    differ("The seeds of the audits are not the same", lambda a: a.context.config.get("seed"))
    differ("The attempts of each attack are not as many", lambda a: _attack_config(a).get("seeds"))
    differ("The points of each curve are not as many", lambda a: _attack_config(a).get("eval_points"))
    differ("Results are not measured alike", lambda a: a.context.config.get("task"))
    if len({frozenset(audit.attacks) for audit in audits}) > 1:
        counts = "; ".join(f"{audit.label}: {len(audit.attacks)}" for audit in audits)
        texts.append(f"Not the same attacks were tried, and worst cases are of those that were ({counts}).")
    unlike = [name for name in shared if len({_budget(audit, name) for audit in audits}) > 1]
    if unlike:
        texts.append(printable(f"Attacks of the same name are not the same: {', '.join(unlike)}."))
    return texts


def _digest(hashes: Mapping[str, str]) -> str | None:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:8] if hashes else None


def _told(value: Any) -> str:
    if value is None:
        return "not known"
    return value[:8] if isinstance(value, str) else str(value)


def _attack_config(audit: AuditReport) -> Mapping[str, Any]:
    config: Mapping[str, Any] = audit.context.config.get("attack") or {}
    return config


def _budget(compared: _Compared, name: str) -> str:
    """Return what decides how strong an attack is: its strategy, or of a search, whose winners differ, its budget."""
    searches = [search for search in compared.report.context.searches if search["name"] == name]
    facts = [{key: search.get(key) for key in ("role", "sampler", "budget", "steps")} for search in searches]
    return json.dumps(facts or compared.attacks[name].strategy, sort_keys=True)


def _worst(worst: WorstCase | None) -> str:
    return tables.gap(worst.deciding.gap_closed) if worst else "-"


def _removal(results: Results) -> str:
    worst = results.worst_case.get("overall")
    return tables.gap(worst.removal, str(results.best_filtered)) if worst else "-"


def _audits_table(audits: Sequence[_Compared], shared: Sequence[str]) -> Table:
    rows = []
    for audit in audits:
        results, context = audit.report.results, audit.report.context
        common = [audit.attacks[name] for name in shared]
        harm, grown = results.worst_harm, context.masking.growth() if context.masking else None
        rows.append(
            [
                tables.name(audit.label),
                str(audit.report.verdict.word).lower(),
                printable(str(context.checkpoint.get("method") or "-")),
                format_difference(context.intactness.loss.value, context.intactness.metric)
                if context.intactness
                else "-",
                _worst(worst_case(common, results.metric) if common else None),
                *(_worst(results.worst_case.get(group)) for group in ("overall", *EXPOSURES)),
                _removal(results),
                format_difference(harm.harm.value, results.metric) if harm else "-",
                (f"{results.masked_share:.2f}" if known(results.masked_share) else "-")
                + (f"\nweights {grown.mean:.3g} times as large" if grown else ""),
            ]
        )
    groups = ["shared attacks", "all attacks", *EXPOSURE_WORDS.values()]
    head = ["audit", "judged", "method", "intactness loss", *(f"gap closed, {group}" for group in groups)]
    head += ["R", "harm to benign use", "masked share"]
    kept = [at for at in range(len(head)) if at < 3 or any(row[at] != "-" for row in rows)]
    return Table([head[at] for at in kept], [[row[at] for at in kept] for row in rows], 3)


def _map(audits: Sequence[_Compared], rows: Mapping[str, Sequence[float]], first: str) -> Table:
    cells = [[tables.name(name), *(f"{v:.2f}" if known(v) else "-" for v in values)] for name, values in rows.items()]
    levels = [[tables.gap_strength(value) for value in values] for values in rows.values()]
    return Table([first, *(audit.label for audit in audits)], cells, 1, levels)


def _families(audits: Sequence[_Compared]) -> Iterator[Element]:
    columns = [audit.report.results.families for audit in audits]
    names = dict.fromkeys(name for families in columns for name in families)
    rows = {
        name: [families[name].deciding.gap_closed.value if name in families else math.nan for families in columns]
        for name in names
    }
    if rows:
        yield "Gap closed in the worst case of each family; a family may hold other attacks in another audit."
        yield _map(audits, rows, "family")


def _attack_map(audits: Sequence[_Compared], shared: Sequence[str]) -> Iterator[Element]:
    if not shared:
        yield "No attack was run in all of these audits."
        return
    yield (
        "Attacks that all audits ran; those that get through most come first. The stronger the colour, the less holds."
    )
    yield _map(audits, {name: [a.attacks[name].gap_closed.value for a in audits] for name in shared}, "attack")


def _values(audits: Sequence[_Compared], shared: Sequence[str]) -> Iterator[Element]:
    lines = [(name, {a.label: a.attacks[name].roles.get("protected", Score()) for a in audits}) for name in shared]
    metric = audits[0].report.results.metric
    if not any(score.seeds for _, scores in lines for score in scores.values()):
        return
    marks = list(_MARKS)
    looks = {audit.label: (HUES[n % len(HUES)], marks[n % len(marks)]) for n, audit in enumerate(audits)}
    series = {label: (COLOURS[hue], mark) for label, (hue, mark) in looks.items()}
    svg = dots(lines, series, metric, "after shared attacks, by audit", apart=min(0.14, 0.8 / len(audits)))
    better = "higher" if metric.higher_is_better else "lower"
    yield (
        f"What the protected models reach on the restricted domain's test split, {tables.metric_name(metric)}, with "
        f"95 % intervals; {better} is better for the attacker."
    )
    legend = [(hue, f"{_MARKS[mark]} {label}") for label, (hue, mark) in looks.items()]
    yield Drawings({" ": Markup(svg)}, "large", legend)


def _sources(audits: Sequence[_Compared], unshared: set[str]) -> Iterator[Element]:
    rows = []
    for audit in audits:
        path, sha256 = (printable(str(audit.report.context.checkpoint.get(key) or "-")) for key in ("path", "sha256"))
        rows.append([tables.name(audit.label), f"{path}\nsha256 {sha256}", printable(str(audit.folder))])
    yield Table(["audit", "checkpoint", "run directory"], rows, 3)
    if unshared:
        ran = [
            [tables.name(name), ", ".join(audit.label for audit in audits if name in audit.attacks)]
            for name in sorted(unshared)
        ]
        yield Fold(f"{len(ran)} attacks that not all of the audits ran", [Table(["attack", "run in"], ran, 2)])
