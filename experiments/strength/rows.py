"""The rows of the table: names, each with the overrides that make it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import yaml

from sophon.errors import UserError, choose

ROWS = Path(__file__).with_name("methods.yaml")
GROUPS = ("methods", "ablations")


def read_rows(path: Path = ROWS) -> dict[str, dict[str, list[str]]]:
    """Return the rows of each group of `GROUPS`: by name, a list of overrides.

    Raises:
        UserError: the file has another form, or two rows have one name.
    """
    found = yaml.safe_load(path.read_text())
    if not isinstance(found, dict) or not set(found) <= set(GROUPS):
        raise UserError(f"{path}: give groups of rows; allowed: {', '.join(GROUPS)}")
    groups = {group: dict(found.get(group) or {}) for group in GROUPS}
    names = [name for rows in groups.values() for name in rows]
    for name in names:
        if names.count(name) > 1 or not str(name).replace("_", "").isalnum() or name in (*GROUPS, "controls"):
            raise UserError(f"{path}: '{name}' is not allowed; a row has a name of letters and digits of its own")
    for name, overrides in ((name, each) for rows in groups.values() for name, each in rows.items()):
        if not isinstance(overrides, list) or not all(isinstance(each, str) and "=" in each for each in overrides):
            raise UserError(f"{path}: {name}: {overrides} is not a list of overrides such as method=pool")
    return groups


def chosen(groups: dict[str, dict[str, list[str]]], names: Iterable[str]) -> dict[str, list[str]]:
    """Return the named rows in that order; the name of a group stands for all of its rows.

    Raises:
        UserError: there is no row or group of a name.
    """
    rows = {name: overrides for group in groups.values() for name, overrides in group.items()}
    wanted: dict[str, list[str]] = {}
    for name in names:
        choose("--methods", name, [*groups, *rows])
        wanted |= groups[name] if name in groups else {name: rows[name]}
    return wanted
