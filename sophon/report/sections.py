"""The sections of an audit's report: what is in them, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from sophon.audit.gallery import shot, strips
from sophon.audit.verdict import EXPOSURES, Record, format_difference, format_value, printable
from sophon.report import tables
from sophon.report.document import Card, Figures, Fold, Note, Part, Pictures, Section, Strips
from sophon.report.figures import EXPOSURE_WORDS, curve_panels, dot_plots
from sophon.report.heat import attack_map
from sophon.report.masking import masking
from sophon.report.repeat import repeat
from sophon.report.tables import SHOWN_ROLES, metric_name
from sophon.report.trends import course_panels, decay_plot, search_panels

_LEGEND = (("protected", "● protected"), ("unprotected", "■ unprotected"), ("scratch", "◆ scratch"))
_MANY = 12  # so many tables' rows or panels are shown without being asked for


def cards(summary: Record) -> list[Card]:
    """Return the few numbers that come first: intactness, gap closed by exposure, harm to benign fine-tuning."""
    intactness, metric = summary["intactness"], summary["metric"]
    found = []
    if intactness:
        before, after = (format_value(intactness[key], intactness) for key in ("before", "after"))
        detail = f"loss {format_difference(intactness['loss'], intactness)}, from {before}"
        found.append(Card("Intactness", after, detail, "on the original domain"))
    for exposure in ("overall", *EXPOSURES):
        group = summary["worst_case"][exposure]
        title = f"Gap closed, {EXPOSURE_WORDS.get(exposure, exposure)}"
        found.append(_gap_card(title, group, metric) if group else Card(title, "-", "", "not attacked"))
    if worst := (summary.get("benign") or {}).get("worst_harm"):
        value, interval = format_difference(worst["value"], metric), tables.interval(worst, metric).partition(" ")[2]
        found.append(Card("Harm to benign use", value, interval, f"worst: {printable(worst['attack'])}"))
    return found


def _gap_card(title: str, group: Record, metric: Record) -> Card:
    closed, note = group["gap_closed"], f"worst of {group['attacks']}"
    if best := group["roles"].get("protected"):
        note += f": {printable(best['attack'])} reaches {format_value(best['mean'], metric)}"
    value, _, interval = tables.gap(closed).partition(" ")
    return Card(title, value, interval, f"{note}; {closed['reason']}" if closed["reason"] else note)


def thresholds(summary: Record) -> Note:
    """Say where the verdict's words begin and end."""
    limits = summary["thresholds"]
    return Note(
        f"Gap closed is 0 for no protection and 1 for no better a start than scratch. The verdict calls "
        f"{limits['holds_from']:g} and above holding, below {limits['no_protection_below']:g} no protection, and "
        "between them weakening."
    )


def sections(run_dir: Path, summary: Record, attempts: Sequence[Record]) -> list[Section]:
    """Return what the report consists of; sections without content are left out.

    Args:
        run_dir: where pictures lie.
        summary: the content of ``audit.json``, also of an older one.
        attempts: the stored attempts.
    """
    restricted = [a for a in attempts if (a.get("domain") or "restricted") == "restricted"]
    found = [
        Section("map", "Attack by role", list(_map(summary))),
        Section("attacks", "Attacks", list(_attacks(summary))),
        Section("curves", "Curves", list(_curves(summary, restricted))),
        Section("searches", "Searches", list(_searches(summary))),
        Section("course", "Does protection wear off?", list(_course(summary))),
        Section("masking", "Masking", list(masking(summary))),
        Section("benign", "Benign fine-tuning", list(_benign(summary))),
        Section("controls", "Controls", list(_controls(summary))),
        Section("samples", "Samples", list(_samples(run_dir, summary, restricted))),
        Section("further", "Further measurements", list(_further(summary))),
        Section("repeat", "To read and to repeat this", list(repeat(summary))),
    ]
    return [section for section in found if section.parts]


def _better(summary: Record) -> str:
    return f"{'higher' if summary['metric']['higher_is_better'] else 'lower'} is better for the attacker"


def _folded(title: str, part: Part, count: int) -> Part:
    """Fold what is long."""
    return part if count <= _MANY else Fold(title, [part])


def _map(summary: Record) -> Iterator[Part]:
    if summary["attacks"]:
        yield Note(
            f"Mean {metric_name(summary)} on the restricted domain's test split; {_better(summary)}. The stronger the "
            "colour, the better for the attacker; in each group the attack that gets most out of the protected model "
            "comes first."
        )
        yield attack_map(summary)


def _attacks(summary: Record) -> Iterator[Part]:
    attacks = summary["attacks"]
    if not attacks:
        return
    yield Note(
        f"Mean {metric_name(summary)} on the restricted domain's test split, ± half width of the 95 % confidence "
        f"interval over seeds; {_better(summary)}. Gap closed with its bootstrap interval."
    )
    yield tables.worst_table(summary)
    yield _folded(f"All {len(attacks)} attacks", tables.attacks_table(summary), len(attacks))
    # ElementTree wrote this and every other drawing, escaping each text and attribute.
    sheets = [Markup(svg) for svg in dot_plots(attacks, summary["metric"])]
    yield _folded("All attacks with their intervals", Figures(sheets, size="large", legend=_LEGEND), len(attacks))


def _curves(summary: Record, attempts: Sequence[Record]) -> Iterator[Part]:
    attacks = summary["attacks"]
    panels = curve_panels(attempts, [attack["attack"] for attack in attacks], summary["metric"])
    if not panels:
        return
    title = metric_name(summary)
    yield Note(
        f"{title[:1].upper()}{title[1:]} on the attacker's own select split; means over seeds with 95 % bands; the "
        "same vertical axis everywhere."
    )
    groups = {
        EXPOSURE_WORDS[exposure]: [a["attack"] for a in attacks if a["exposure"] == exposure and a["attack"] in panels]
        for exposure in EXPOSURES
    }
    if len(panels) <= _MANY:
        groups = {"": [attack for group in groups.values() for attack in group]}
    for exposure, group in groups.items():
        figures = Figures([Markup(panels[attack]) for attack in group], [printable(attack) for attack in group])
        if group:
            yield Fold(f"{exposure} ({len(group)})", [figures]) if exposure else figures


def _searches(summary: Record) -> Iterator[Part]:
    found = tables.searches_table(summary)
    if found is None:
        return
    title = metric_name(summary)
    yield Note(
        f"The same search, with the same budget, against every role, judged by {title} on the attacker's select "
        "split. Lines: the best complete trial so far. Marks: single trials, a cross where one was stopped early; the "
        "worst tenth lies at the edge."
    )
    panels = search_panels(summary["searches"], summary["metric"])
    yield Figures([*map(Markup, panels.values())], [*map(printable, panels)], "medium", _LEGEND)
    yield found


def _course(summary: Record) -> Iterator[Part]:
    attacks = summary["attacks"]
    course, decay = tables.horizons_table(summary), tables.decay_table(summary)
    if course is None and decay is None:
        return
    yield Note(
        "SGRC in percent: how much protection takes off the unprotected result. A line that falls towards 0 says that "
        "an attacker needs only patience."
    )
    if decay is not None:
        yield Note("By length, on the test split: attacks that differ only in their number of steps.")
        if svg := decay_plot(summary["decay"]):
            yield Figures([Markup(svg)], size="large")
        yield _folded("By length, in figures", decay, len(decay.rows))
    if course is not None:
        yield Note("In the course of each attack, on the select split.")
        groups = {EXPOSURE_WORDS[e]: [a for a in attacks if a["exposure"] == e] for e in EXPOSURES}
        panels = course_panels(groups)
        yield Figures([*map(Markup, panels.values())], [*map(printable, panels)])
        yield Fold("In the course of each attack, in figures", [course])


def _benign(summary: Record) -> Iterator[Part]:
    found = tables.benign_table(summary)
    if found is None:
        return
    mean = format_difference(summary["benign"]["mean_harm"], summary["metric"])
    yield Note(
        f"The same attackers as ordinary users on a domain that is not restricted: {metric_name(summary)} on its test "
        f"split. Harm is what protection takes from them; it should be about zero. Mean harm: {mean}."
    )
    yield found


def _controls(summary: Record) -> Iterator[Part]:
    if found := tables.controls_table(summary):
        yield Note(
            f"What the results are to be read against: {metric_name(summary)} on the restricted domain's test split. "
            "The oracle has data that no attacker here has."
        )
        yield found


def _samples(run_dir: Path, summary: Record, attempts: Sequence[Record]) -> Iterator[Part]:
    if gallery := summary.get("gallery"):
        yield Pictures([shot(run_dir, entry["file"], entry["title"]) for entry in gallery])
    drawn = strips(run_dir, attempts, [attack["attack"] for attack in summary["attacks"]], SHOWN_ROLES)
    if drawn:
        yield Note(
            "What the attacked models generate in the course of each attack, from the same noise everywhere; of "
            "several seeds the first."
        )
        found = Strips({printable(attack): strip for attack, strip in drawn.items()})
        yield _folded(f"All {len(drawn)} attacks", found, len(drawn))


def _further(summary: Record) -> Iterator[Part]:
    found = tables.further_table(summary)
    if found is None:
        return
    note = "Means over the attempts that succeeded, on the restricted domain's test split."
    if any(row[1] == tables.FRECHET for row in found.rows):
        network = summary.get("feature_network") or "a network that the audit does not name"
        note += (
            f" {tables.FRECHET}: from the images that the attacked model generates to those of that split, lower is "
            f"closer; features: {printable(network)}."
        )
    yield Note(note)
    yield _folded("All measurements", found, len(found.rows))
