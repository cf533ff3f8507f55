"""The configuration groups: folders of files, of which a command chooses one by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sophon.config.shipped import conf_dir as conf_dir

ROLES = ("original", "restricted", "benign")  # what a domain can be: `domain@domain.original=NAME`


def groups(searched: Iterable[str] = ()) -> list[str]:
    """Return the names of the groups, such as ``attack/family``, also of those in the folders ``searched``."""
    names = {path.parent.relative_to(root).as_posix() for root in roots(searched) for path in root.rglob("*.yaml")}
    return sorted(names - {"."})


def choices(group: str, searched: Iterable[str] = ()) -> list[str]:
    """Return the names of a group's files."""
    return sorted({path.stem for root in roots(searched) for path in (root / group).glob("*.yaml")})


def roots(searched: Iterable[str]) -> list[Path]:
    """Return the folders that hold groups: the shipped one, and those ``searched`` besides."""
    return [conf_dir(), *map(Path, searched)]
