"""What the fields of a configuration may be, stated at the field and checked in one place."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Self

from sophon.errors import UserError, choose, likely

_LIMITS = {"ge": (">=", float.__ge__), "gt": (">", float.__gt__), "le": ("<=", float.__le__), "lt": ("<", float.__lt__)}


class Arguments:
    """A dataclass that refuses an argument that is none of its fields in one line, with what was likely meant."""

    def __new__(cls, *_: Any, **given: Any) -> Self:
        """Look at the names only."""
        parameters = inspect.signature(cls.__init__).parameters.values()
        own = {parameter.name for parameter in parameters if parameter.kind not in _VARIABLE}
        allowed = [*(own - {"self"}), *(part.name for part in fields(cls) if part.name not in own)]  # type: ignore[arg-type]
        for name in given:
            if name not in allowed:
                raise UserError(
                    f"{name}: no such argument{likely(name, allowed)}; allowed: {', '.join(sorted(allowed))}"
                )
        return super().__new__(cls)


_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def limited(
    default: Any = MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    choices: Iterable[str] | None = None,
    path: bool = False,
) -> Any:
    """Make a dataclass field whose value, or each in its list or mapping, is limited.

    Args:
        ge: the least number allowed.
        gt: a number that is too little by itself.
        le: the greatest number allowed.
        lt: a number that is too much by itself.
        choices: the words allowed.
        path: whether it is a path: not empty, and with ``~`` for a home folder.
    """
    rules = {"ge": ge, "gt": gt, "le": le, "lt": lt, "choices": choices, "path": path or None}
    metadata = {name: rule for name, rule in rules.items() if rule is not None}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check(config: Any, key: str = "") -> None:
    """Raise a `UserError` that names the key unless every value of a dataclass, and of those in it, is allowed.

    What several fields have to do with each other is said by a method ``validate(key)`` of their dataclass.
    """
    for part, name, value in _parts(config, key):
        check_value(name, value, part)
        alone = part.metadata.get("alone") and len(value) == 1  # a mapping of one is that one
        for below, member in [(name, *value.values())] if alone else _members(name, value):
            if is_dataclass(member):
                check(member, below)
    if hasattr(config, "validate"):
        config.validate(key)


def check_value(key: str, value: Any, part: Field[Any]) -> None:
    """Raise a `UserError` that names ``key`` unless the field ``part`` of a dataclass may have ``value``."""
    kind, rules = str(part.type), part.metadata
    number = re.search(r"\b(int|float)\b", kind)
    for name, member in _members(key, value) if kind.startswith(("list", "dict")) else [(key, value)]:
        if member is None and "None" in kind:
            continue
        if "choices" in rules:
            choose(name, member, rules["choices"])
        elif rules.get("path") and not member:
            raise UserError(f"{name}: '{member}' is not allowed; give a path, or leave the key out")
        elif number is not None and not is_dataclass(member) and not isinstance(member, list):
            whole = number[1] == "int"
            limits = [(sign, rules[rule], fits) for rule, (sign, fits) in _LIMITS.items() if rule in rules]
            right = (
                isinstance(member, int if whole else int | float)
                and not isinstance(member, bool)
                and math.isfinite(member)
            )
            if not (right and all(fits(float(member), float(limit)) for _, limit, fits in limits)):
                allowed = f"a {'whole' if whole else 'finite'} number" + " and".join(
                    f" {s} {n:g}" for s, n, _ in limits
                )
                raise UserError(
                    f"{name}: {member} is not allowed; give {allowed}{' or null' if 'None' in kind else ''}"
                )


def expand_paths(config: Any) -> None:
    """Put the user's home folder in the place of a leading ``~`` in every path of a dataclass and of those in it."""
    for part, name, value in _parts(config, ""):
        if part.metadata.get("path") and value:
            at_home = [
                str(Path(member).expanduser()) if member.startswith("~") else member
                for _, member in _members(name, value)
            ]
            setattr(config, part.name, at_home if isinstance(value, list) else at_home[0])
        for _, member in _members(name, value):
            if is_dataclass(member):
                expand_paths(member)


def _parts(config: Any, key: str) -> Iterator[tuple[Field[Any], str, Any]]:
    for part in fields(config):
        yield part, f"{key}.{part.name}" if key else part.name, getattr(config, part.name)


def _members(key: str, value: Any) -> list[tuple[str, Any]]:
    """Return what is in a list or a mapping with its key; anything else is the one member of itself."""
    if isinstance(value, Mapping):
        return [(f"{key}.{name}", member) for name, member in value.items()]
    if isinstance(value, list):
        return [(f"{key}[{index}]", member) for index, member in enumerate(value)]
    return [(key, value)]
