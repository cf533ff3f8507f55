"""An audit's report: a page, the same tables as Markdown, and a short table for the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup
from omegaconf import OmegaConf

from sophon.auditing.summary import AuditReport, Context
from sophon.auditing.table import trials_table
from sophon.auditing.words import Record, format_difference, format_value, printable
from sophon.files import write_text
from sophon.held_out import EXPOSURE_WORDS, EXPOSURES
from sophon.report import tables
from sophon.report.axes import decay, recovery, shots
from sophon.report.drawing import own
from sophon.report.figures import curve_panels, dot_plot, search_panels
from sophon.report.geometry import geometry
from sophon.report.masking import masking
from sophon.report.page import MANY, Code, Drawings, Element, Fold, KeyFigure, Page, Section, Table, folded
from sophon.report.pictures import picture, pictures
from sophon.report.tables import metric_name
from sophon.report.terms import TERMS

_MARKS = {"protected": "●", "unprotected": "■", "filtered": "▲", "scratch": "◆"}


def _legend(audit: AuditReport) -> list[tuple[str, str]]:
    return [(own(role), f"{_MARKS[own(role)]} {role}") for role in audit.results.roles]


def table(audit: AuditReport) -> str:
    """Return the attacks as a Markdown table that also reads well in a terminal, without a final newline."""
    return tables.short_table(audit.results).markdown()


def write_reports(folder: Path, audit: AuditReport) -> str:
    """Write ``report.html`` (one self-contained file) and ``report.md`` into an audit's folder, atomically.

    Pictures that the folder lacks are named in the page instead of shown. Returns the HTML.

    Raises:
        UserError: a file cannot be written.
    """
    page = audit_page(folder, audit)
    html = page.html()
    write_text(folder / "report.html", html)
    write_text(folder / "report.md", page.markdown())
    return html


def audit_page(folder: Path, audit: AuditReport) -> Page:
    """Return the page of an audit whose pictures lie in ``folder``."""
    sections = [
        Section("curves", "Curves", list(_curves(audit))),
        Section("worst", "Worst cases", list(_worst(audit))),
        Section("attacks", "Attacks", list(_attacks(audit))),
        Section("searches", "Searches", list(_searches(audit))),
        Section("decay", "Does protection wear off?", list(decay(audit.results))),
        Section("recovery", "Steps to recover", list(recovery(audit.results))),
        Section("shots", "With few images", list(shots(audit.results))),
        Section("masking", "Masking", list(masking(audit.results, audit.context.masking))),
        Section("geometry", "Distance to the reference", list(geometry(audit))),
        Section("benign", "Benign fine-tuning", list(_benign(audit))),
        Section("controls", "Controls", list(_controls(audit))),
        Section("samples", "Samples", list(_samples(folder, audit))),
        Section("further", "Further measurements", list(_further(audit))),
        Section("repeat", "To repeat this", list(_repeat(audit))),
    ]
    return Page(
        title=printable(f"Audit of {audit.context.checkpoint.get('name') or 'a checkpoint'}"),
        word=str(audit.verdict.word),
        lead=printable(audit.verdict.sentence),
        facts=_facts(audit),
        cards=list(_cards(audit)),
        notes=[printable(finding) for finding in (audit.verdict.knowing, *audit.verdict.findings)],
        sections=sections,
        terms=TERMS,
    )


def _facts(audit: AuditReport) -> dict[str, str]:
    context, model = audit.context, audit.context.config.get("model") or {}
    size = f", {model['image_size']} x {model['image_size']} x {model['channels']}" if "image_size" in model else ""
    facts = {
        "Model": f"{model.get('architecture') or ''}{size}",
        "Method": str(context.checkpoint.get("method") or "not known"),
        "Original domain": context.domains.get("original") or "",
        "Restricted domain": context.domains.get("restricted") or "",
        "Date": context.date,
        "Rests on": audit.verdict.basis,
    }
    return {name: printable(value) for name, value in facts.items() if value}


def _cards(audit: AuditReport) -> Iterator[KeyFigure]:
    """Yield the few numbers that come first; what was not measured has none."""
    results, kept = audit.results, audit.context.intactness
    if worst := results.worst_case.get("overall"):
        titles = {"own_best": "own best attacks", "same_attack": "same attack"}
        if not worst.readings_differ:
            titles = {"own_best": "in both readings"}
        for reading, title in titles.items():
            case = getattr(worst, reading)
            if "protected" in case.attacks:
                value, *rest = tables.gap(case.gap_closed).splitlines()
                decides = ["the lower, which decides"] * (reading == worst.decided_by and len(titles) > 1)
                yield KeyFigure(f"Gap closed, {title}", value, "; ".join([*rest, *decides]))
        if worst.removal:
            value, *rest = tables.gap(worst.removal, str(results.best_filtered)).splitlines()
            yield KeyFigure("R, the worse reading", value, "; ".join([*rest, f"against {results.best_filtered}"]))
    if kept:
        than = f"{'more' if kept.after > kept.before else 'less'} than {format_value(kept.before, kept.metric)}"
        loss = f"{format_difference(abs(kept.loss.value), kept.metric)} {than}"
        yield KeyFigure("Original domain", format_value(kept.after, kept.metric), f"{loss}; {kept.images} test images")
    if harm := results.worst_harm:
        note = f"at most: {printable(harm.attack)}"
        yield KeyFigure("Harm to benign use", format_difference(harm.harm.value, results.metric), note)


def _worst(audit: AuditReport) -> Iterator[Element]:
    if audit.results.worst_case:
        yield (
            f"{_measured(audit)} An attacker takes the attack that does best on the select split; below each value "
            "stands which. Groups of attacks show the reading that decides."
        )
        yield tables.worst_table(audit.results)


def _measured(audit: AuditReport) -> str:
    metric = audit.results.metric
    better = "higher" if metric.higher_is_better else "lower"
    return (
        f"Mean {metric_name(metric)} on the restricted domain's test split, with 95 % intervals; {better} is better "
        "for the attacker."
    )


def _attacks(audit: AuditReport) -> Iterator[Element]:
    attacks = audit.results.attacks
    if not attacks:
        return
    yield (
        f"{_measured(audit)} The stronger the colour, the better for the attacker. What gets most out of the protected "
        "model comes first: an attack that gets little out of every model closes little, and breaks nothing."
    )
    yield folded(f"All {len(attacks)} attacks", tables.attacks_table(audit.results), len(attacks))
    # ElementTree wrote this and every other drawing, escaping each text and attribute.
    drawing = Drawings({" ": Markup(dot_plot(attacks, audit.results.metric))}, "large", _legend(audit))
    yield folded("All attacks with their intervals", drawing, len(attacks))


def _curves(audit: AuditReport) -> Iterator[Element]:
    attacks, metric = audit.results.attacks, audit.results.metric
    panels = curve_panels(audit.attempts, [attack.attack for attack in attacks], metric)
    if not panels:
        return
    yield (
        f"{metric_name(metric)[:1].upper()}{metric_name(metric)[1:]} on the attacker's own select split in the course "
        "of fine-tuning; bands span the seeds. All panels have the same axis."
    )
    groups = {
        EXPOSURE_WORDS[exposure]: [a.attack for a in attacks if a.exposure == exposure and a.attack in panels]
        for exposure in EXPOSURES
    }
    if len(panels) <= MANY:
        groups = {"": [attack for group in groups.values() for attack in group]}
    elif worst := audit.results.worst_case.get("overall"):
        first = {*worst.same_attack.attacks.values(), *worst.own_best.attacks.values()} & set(panels)
        yield "Those of the worst case:"
        yield _drawings({attack: panels[attack] for attack in sorted(first)})
        groups = {words: [attack for attack in group if attack not in first] for words, group in groups.items()}
    for exposure, group in groups.items():
        drawings = _drawings({attack: panels[attack] for attack in group})
        if group:
            yield Fold(f"{exposure} ({len(group)})", [drawings]) if exposure else drawings


def _drawings(panels: Mapping[str, str], size: str = "small", legend: Sequence[tuple[str, str]] = ()) -> Drawings:
    return Drawings({printable(caption): Markup(svg) for caption, svg in panels.items()}, size, legend)


def _searches(audit: AuditReport) -> Iterator[Element]:
    metric = audit.results.metric
    trials = trials_table(audit.context.searches, higher_is_better=metric.higher_is_better)
    if trials.empty:
        return
    yield (
        f"The same search, with the same budget, against every role, judged by {metric_name(metric)} on the attacker's "
        "select split. Lines: the best complete trial so far. Marks: single trials, a cross where one was stopped "
        "early; the worst tenth lies at the edge."
    )
    yield _drawings(search_panels(trials, metric), "medium", _legend(audit))
    yield tables.searches_table(trials, metric)


def _benign(audit: AuditReport) -> Iterator[Element]:
    if audit.results.benign:
        yield (
            "The same attackers as ordinary users on a domain that is not restricted: "
            f"{metric_name(audit.results.metric)} on its test split. "
            "Harm is what protection takes from them; it should be about zero."
        )
        yield tables.benign_table(audit.results)


def _controls(audit: AuditReport) -> Iterator[Element]:
    controls = tables.controls_table(audit.results)
    if controls.rows:
        yield (
            f"What the results are to be read against: {metric_name(audit.results.metric)} on the restricted domain's "
            "test split. The oracle has data that no attacker here has."
        )
        yield controls


def _samples(folder: Path, audit: AuditReport) -> Iterator[Element]:
    if gallery := audit.context.gallery:
        shots = {entry["title"]: picture(folder, entry["file"], entry["title"]) for entry in gallery}
        yield Drawings({printable(title): shot for title, shot in shots.items()}, "gallery")
    if strips := pictures(folder, audit.attempts):
        yield (
            "What the attacked models generate in the course of each attack, from the same noise everywhere; of "
            "several seeds the first."
        )
        parts: list[Element] = [part for attack, strip in strips.items() for part in (printable(attack), strip)]
        yield from [Fold(f"All {len(strips)} attacks", parts)] if len(strips) > MANY else parts


def _further(audit: AuditReport) -> Iterator[Element]:
    further = tables.further_table(audit.attempts, tables.shown(audit.results))
    if not further.rows:
        return
    note = "Means over the attempts that did not diverge, on the restricted domain's test split."
    if any(row[1] == tables.FRECHET for row in further.rows):
        network = audit.context.feature_network or "a network that the audit does not name"
        note += (
            f" {tables.FRECHET}: from the images that the attacked model generates to those of that split, lower is "
            f"closer; features: {printable(network)}. Concept rate: percent of these images that a classifier of both "
            "domains' classes takes for a restricted one."
        )
    yield note
    yield folded("All measurements", further, len(further.rows))


def _repeat(audit: AuditReport) -> Iterator[Element]:
    """Yield the checkpoints, the command, and folded away all that stands behind them."""
    context, frame = audit.context, audit.attempts.table
    yield f"{len(frame)} attempts, {frame['seconds'].sum():.0f} s of attacking in all."
    yield tables.origins_table(audit)
    if context.left_out:
        rows = [[tables.name(attack), printable(reason)] for attack, reason in context.left_out.items()]
        yield "Attacks that were left out, since they do not fit:"
        yield Table(["attack", "why"], rows, 2)
    if context.config:
        yield "To run it again, save the configuration below as conf/experiment/repeat.yaml, and call"
        yield Code(command(context))
        yield Fold("Configuration", [Code(experiment(context.config))])
    facts = {
        "What protection simulated (the sampler's support)": context.support,
        "Hashes of the restricted domain's splits": context.hashes,
        "Package versions": context.packages,
    }
    yield from (Fold(title, [Code(_yaml(fact))]) for title, fact in facts.items() if fact)


def command(context: Context) -> str:
    """Return the command line that repeats an audit with its `experiment` in ``conf/experiment/repeat.yaml``."""
    given = {"checkpoint": context.checkpoint.get("path"), "reference": context.reference.get("path")}
    words = ["sophon", "audit", "--config-dir=conf", "experiment=repeat"]
    if context.filtered:
        given["filtered"] = f"[{','.join(str(origin.get('path')) for origin in context.filtered.values())}]"
    words += [shlex.quote(f"{key}={printable(path)}") for key, path in given.items() if path]
    return " ".join([*words, "run_dir=repeat"])


def experiment(config: Record) -> str:
    """Return an audit's configuration as an experiment file of Hydra's."""
    # the default attacks would add to those that were run
    return "# @package _global_\ndefaults:\n- override /attack: null\n" + _yaml(config)


def _yaml(data: Record) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(dict(data))).rstrip()
