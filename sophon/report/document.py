"""A document for people: sections of tables, heat maps, figures and pictures, as one HTML page or as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sophon.audit.gallery import Shot, Strip


class Name(str):
    """A cell whose first line is a name that somebody gave: Markdown shows it as code."""


class Part(Protocol):
    """What a section is made of; ``kind`` chooses the page's macro, `markdown` may return nothing."""

    kind: ClassVar[str]

    def markdown(self) -> str:
        """Return the part as Markdown without a final newline."""


@dataclass(frozen=True)
class Note:
    """A paragraph, or with ``warning`` one that must not be overlooked."""

    text: str
    warning: bool = False
    kind: ClassVar[str] = "note"

    def markdown(self) -> str:
        """Return the paragraph, warnings as a quotation."""
        return f"> **Warning:** {escaped(self.text)}" if self.warning else escaped(self.text)


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        head: titles of the columns.
        rows: as many cells each; what follows a cell's first line is set small.
        text: so many columns from the left hold words, the others figures.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: int = 1
    kind: ClassVar[str] = "table"

    def markdown(self) -> str:
        """Return a Markdown table that also reads well in a terminal."""
        lines = [[escaped(title) for title in self.head], *([_cell(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
        return "\n".join(
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in ruled
        )


def _cell(cell: str) -> str:
    first, *small = cell.splitlines() or [""]
    first = "`" + first.replace("`", "'").replace("|", r"\|") + "`" if isinstance(cell, Name) else escaped(first)
    return first + "".join(f"{' ' if line.startswith('[') else '; '}{escaped(line)}" for line in small)


def escaped(text: str) -> str:
    """Return text so that Markdown shows it as it is; the brackets of an interval are no link, and stay readable."""
    return re.sub(r"([\\`*<>&|]|\[(?!-?\d[^\]]*\](?!\()))", r"\\\1", text)


@dataclass(frozen=True)
class Heat:
    """A table whose cells are coloured.

    Attributes:
        head: titles of the columns.
        blocks: rows by caption; a row is its name and, for each further column, a text and how strong its colour is,
            0 .. 100; None for no colour.
        ends: what the weakest and the strongest colour mean.
        markdown_too: whether Markdown shows it, which has no colours.
    """

    head: Sequence[str]
    blocks: Mapping[str, Sequence[tuple[str, Sequence[tuple[str, int | None]]]]]
    ends: tuple[str, str]
    markdown_too: bool = False
    kind: ClassVar[str] = "heat"

    def markdown(self) -> str:
        """Return it as one table, or nothing."""
        if not self.markdown_too:
            return ""
        rows = [[Name(name), *(text for text, _ in cells)] for block in self.blocks.values() for name, cells in block]
        return Table(self.head, rows).markdown()


@dataclass(frozen=True)
class Figures:
    """Drawings.

    Attributes:
        drawings: SVG, which the page trusts.
        captions: of each, or none.
        size: ``small`` (three in a row of a wide screen), ``medium`` (two) or ``large``.
        legend: CSS class and text of each kind of mark.
    """

    drawings: Sequence[Markup]
    captions: Sequence[str] = ()
    size: str = "small"
    legend: Sequence[tuple[str, str]] = ()
    kind: ClassVar[str] = "figures"

    def markdown(self) -> str:
        """Return nothing: Markdown has no drawings."""
        return ""


@dataclass(frozen=True)
class Pictures:
    """Pictures side by side."""

    shots: Sequence[Shot]
    kind: ClassVar[str] = "pictures"

    def markdown(self) -> str:
        """Return nothing: the pictures lie beside the Markdown file."""
        return ""


@dataclass(frozen=True)
class Strips:
    """Pictures in the course of attacks, by attack."""

    strips: Mapping[str, Strip]
    kind: ClassVar[str] = "strips"

    def markdown(self) -> str:
        """Return nothing: the pictures lie beside the Markdown file."""
        return ""


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    text: str
    language: str = ""
    kind: ClassVar[str] = "code"

    def markdown(self) -> str:
        """Return it fenced."""
        return f"```{self.language}\n{self.text}\n```"


@dataclass(frozen=True)
class Terms:
    """Terms and what they mean."""

    terms: Mapping[str, str]
    kind: ClassVar[str] = "terms"

    def markdown(self) -> str:
        """Return a list."""
        return "\n".join(f"- {_cell(Name(term))}: {escaped(meaning)}" for term, meaning in self.terms.items())


@dataclass(frozen=True)
class Fold:
    """Parts that the page shows on request, and paper and Markdown always."""

    title: str
    parts: Sequence[Part]
    open: bool = False
    kind: ClassVar[str] = "fold"

    def markdown(self) -> str:
        """Return the parts under a title."""
        body = _joined(self.parts)
        return f"### {escaped(self.title)}\n\n{body}" if body else ""


@dataclass(frozen=True)
class Section:
    """A part of the document that the table of contents names; ``key`` is its anchor."""

    key: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Card:
    """A figure that comes first: title, value, detail (a loss or an interval) and note."""

    title: str
    value: str
    detail: str
    note: str


@dataclass(frozen=True)
class Document:
    """Everything that a page shows."""

    title: str
    lead: str
    notes: Sequence[Note] = ()
    cards: Sequence[Card] = ()
    sections: Sequence[Section] = field(default_factory=list)

    def html(self) -> str:
        """Return the document as one HTML page that loads nothing."""
        environment = Environment(
            loader=PackageLoader("sophon.report"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters["breakable"] = _breakable
        return environment.get_template("page.html.j2").render(document=self)

    def markdown(self) -> str:
        """Return the document as Markdown, without what only a page can show."""
        cards = "\n".join(
            f"- {escaped(card.title)}: {card.value} {escaped(card.detail)} ({escaped(card.note)})"
            for card in self.cards
        )
        parts = [f"# {escaped(self.title)}", f"**{escaped(self.lead)}**", _joined(self.notes), cards]
        for section in self.sections:
            body = _joined(section.parts)
            parts.append(f"## {escaped(section.title)}\n\n{body}" if body else "")
        return "\n\n".join(part for part in parts if part) + "\n"


def _breakable(text: str) -> Markup:
    """Let a long name be broken where its words end rather than anywhere."""
    return Markup(str(escape(text)).replace("_", "_<wbr>"))


def _joined(parts: Iterable[Part]) -> str:
    return "\n\n".join(text for text in (part.markdown() for part in parts) if text)
