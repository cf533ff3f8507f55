"""A page for people: a headline, then sections of text, tables and drawings; as HTML, and its tables as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


class Name(str):
    """A cell whose first line is a name that somebody gave: Markdown shows it as code."""


class Link(Name):
    """A name that leads somewhere: to ``href``."""

    href: str

    def __new__(cls, text: str, href: str) -> Link:
        """Make the name."""
        link = super().__new__(cls, text)
        link.href = href
        return link


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        head: titles of the columns; those that the page defines lead to their definition.
        rows: as many cells each; what follows a cell's first line is set small, `Markup` is shown as it is.
        text: so many columns from the left hold words, the others figures.
        levels: how strongly each row's last cells are coloured, 0 .. 100; None for no colour.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    levels: Sequence[Sequence[int | None]] = ()

    def markdown(self) -> str:
        """Return a Markdown table that also reads well in a terminal; nothing where cells are pictures."""
        if any(isinstance(cell, Markup) for row in self.rows for cell in row):
            return ""
        lines = [[escaped(title) for title in self.head], *([_cell(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in ruled
        )


@dataclass(frozen=True)
class Drawings:
    """SVGs and pictures, which the page trusts, with their captions.

    Attributes:
        drawings: by caption; captions that begin with a space are not shown.
        size: ``small`` (three in a row of a wide screen), ``medium`` (two) or ``large``.
        legend: CSS class and text of each kind of mark.
    """

    drawings: Mapping[str, Markup]
    size: str = "small"
    legend: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    text: str


@dataclass(frozen=True)
class Warn:
    """A paragraph that must not be overlooked."""

    text: str


@dataclass(frozen=True)
class Fold:
    """Parts that the page shows on request, and paper and Markdown always."""

    title: str
    parts: Sequence[Element]


Element = str | Table | Drawings | Code | Warn | Fold
MANY = 12  # so many tables' rows or panels are shown without being asked for


def folded(title: str, part: Element, count: int) -> Element:
    """Fold what is long."""
    return part if count <= MANY else Fold(title, [part])


@dataclass(frozen=True)
class Section:
    """A part of the page that the table of contents names; ``key`` is its anchor."""

    key: str
    title: str
    parts: Sequence[Element]


@dataclass(frozen=True)
class KeyFigure:
    """A figure that comes first: title, value, and a note below."""

    title: str
    value: str
    note: str


@dataclass(frozen=True)
class Page:
    """Everything that a page shows.

    Attributes:
        title: of the page.
        lead: the sentence that comes first.
        word: one word before it, such as a verdict's.
        facts: what the page is about.
        notes: paragraphs below the lead.
        cards: see `KeyFigure`.
        sections: in order; those without parts are not shown.
        terms: definitions, by the title of the column that leads to them.
    """

    title: str
    lead: str
    word: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str | Warn] = ()
    cards: Sequence[KeyFigure] = ()
    sections: Sequence[Section] = ()
    terms: Mapping[str, str] = field(default_factory=dict)

    @property
    def shown(self) -> list[Section]:
        """Return the sections that have parts."""
        return [section for section in self.sections if section.parts]

    def html(self) -> str:
        """Return one HTML page that loads nothing."""
        return _environment().get_template("page.html.j2").render(page=self)

    def markdown(self) -> str:
        """Return the page as Markdown, without what only a page can show."""
        head = f"{self.word}: {self.lead}" if self.word else self.lead
        facts = [f"- {escaped(name)}: {escaped(value)}" for name, value in self.facts.items()]
        cards = [f"- {escaped(card.title)}: {escaped(card.value)} ({escaped(card.note)})" for card in self.cards]
        parts = [f"# {escaped(self.title)}", f"**{escaped(head)}**", "\n".join([*facts, *cards]), _joined(self.notes)]
        for section in self.shown:
            body = _joined(section.parts)
            parts.append(f"## {escaped(section.title)}\n\n{body}" if body else "")
        if self.terms:
            parts.append(
                "## Definitions\n\n" + "\n".join(f"- {escaped(k)}: {escaped(v)}" for k, v in self.terms.items())
            )
        return "\n\n".join(part for part in parts if part) + "\n"


@cache  # compiling the templates takes as long as filling them in
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("sophon.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = lambda text: Markup(str(escape(text)).replace("_", "_<wbr>"))
    environment.filters["slug"] = lambda text: "term-" + re.sub(r"[^a-z0-9]+", "-", text.lower())
    environment.tests["kind"] = lambda part, name: type(part).__name__ == name
    return environment


def escaped(text: str) -> str:
    """Return text so that Markdown shows it as it is; the brackets of an interval are no link, and stay readable."""
    return re.sub(r"([\\`*<>&|]|\[(?!-?\d[^\]]*\](?!\()))", r"\\\1", text)


def _cell(cell: str) -> str:
    first, *small = cell.splitlines() or [""]
    first = "`" + first.replace("`", "'").replace("|", r"\|") + "`" if isinstance(cell, Name) else escaped(first)
    if isinstance(cell, Link):
        first = f"[{first}]({cell.href})"
    return first + "".join(f"{' ' if line.startswith('[') else '; '}{escaped(line)}" for line in small)


def _joined(parts: Iterable[Element]) -> str:
    return "\n\n".join(text for text in map(_markdown, parts) if text)


def _markdown(part: Element) -> str:
    match part:
        case str():
            return escaped(part)
        case Table():
            return part.markdown()
        case Code():
            return f"```\n{part.text}\n```"
        case Warn():
            return f"> **Warning:** {escaped(part.text)}"
        case Fold():
            body = _joined(part.parts)
            return f"### {escaped(part.title)}\n\n{body}" if body else ""
        case Drawings():
            return ""
