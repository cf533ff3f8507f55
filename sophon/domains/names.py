"""Names of files and classes: what can be printed, and their natural order."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

# control characters; halves of surrogates, which stand for bytes that are not UTF-8; line and paragraph separators
_UNWRITABLE = ("Cc", "Cs", "Zl", "Zp")


def is_writable(name: str) -> bool:
    """Return whether ``name`` can be written as one line of UTF-8."""
    return not any(unicodedata.category(character) in _UNWRITABLE for character in name)


def escaped(text: str) -> str:
    """Return ``text`` with everything that cannot be printed on one line as a backslash escape."""
    return "".join(character if is_writable(character) else ascii(character)[1:-1] for character in text)


def few(names: Iterable[str], most: int = 4) -> str:
    """Join the first ``most`` names by commas; an ellipsis stands for the others."""
    listed = list(names)
    return ", ".join(listed[:most]) + (", ..." if len(listed) > most else "")


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sort names with the numbers in them by value: 2 before 10."""

    def key(name: str) -> list[tuple[int, int, str]]:
        parts = re.split(r"(^-?[0-9]+|[0-9]+)", name)  # a hyphen further on is one between words
        return [(0, int(part), "") if part[-1].isdigit() else (1, 0, part) for part in parts if part]

    return sorted(names, key=key)
