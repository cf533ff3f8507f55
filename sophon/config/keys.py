"""The keys of a configuration: types, defaults and meanings, read off the dataclasses and their docstrings."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from sophon.attacker import FineTuneStrategy
from sophon.config import ComposedConfig, DomainConfig

ANY = "NAME"  # stands for every key of a mapping
# Types that the composed configuration leaves out: adding a strategy takes no more than what differs from the defaults,
# and `domain.restricted` holds the keys of one domain or further ones by name.
_UNTYPED: dict[str, list[Any]] = {
    "attack.strategies": [dict[str, FineTuneStrategy]],
    "domain.restricted": [DomainConfig, dict[str, DomainConfig]],
}


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: dotted; a part that is `ANY` stands for every key of a mapping.
        type: what its value is.
        default: its value where no file and no command says another; `dataclasses.MISSING` where there is none.
        meaning: what the docstring of its dataclass says.
        choices: the words that it may be; empty where it is not one of a few.
    """

    name: str
    type: Any
    default: Any
    meaning: str
    choices: tuple[str, ...] = ()


@cache
def keys() -> dict[str, Key]:
    """Return every key of the configuration by its dotted name; a group comes before what is in it."""
    return {key.name: key for key in _keys(ComposedConfig, "")}


def find(name: str) -> Key | None:
    """Return the key of a dotted name such as ``attack.search.mine.trials``; None if there is none."""
    known, path = keys(), ""
    for part in name.split("."):
        below = f"{path}." if path else ""
        path = next((candidate for candidate in (below + part, below + ANY) if candidate in known), None) or ""
        if not path:
            return None
    return known[path]


def below(name: str) -> dict[str, Key]:
    """Return the keys of a group, or a key by itself, by dotted names; without a name, those that are in no group."""
    if not name:
        return {key.name: key for key in keys().values() if "." not in key.name}
    return {key.name: key for key in keys().values() if key.name == name or key.name.startswith(f"{name}.")}


def content(kind: Any) -> Any:
    """Return a type without its ``None``."""
    if get_origin(kind) in (Union, types.UnionType):
        [kind] = [member for member in get_args(kind) if member is not type(None)]
    return kind


def type_name(kind: Any) -> str:
    """Return a type as people write it."""
    return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")


def optional(kind: Any) -> bool:
    """Return whether a type takes ``None``."""
    return type(None) in get_args(kind)


def _keys(kind: type, prefix: str) -> Iterator[Key]:
    hints, meanings = get_type_hints(kind), _meanings(kind)
    for part in fields(kind):
        name, hint = prefix + part.name, hints[part.name]
        default = part.default if part.default_factory is MISSING else part.default_factory()
        yield Key(name, hint, default, meanings.get(part.name, ""), tuple(part.metadata.get("choices", ())))
        for value_kind in _UNTYPED.get(name, [content(hint)]):
            yield from _inside(value_kind, name)


def _inside(kind: Any, name: str) -> Iterator[Key]:
    if is_dataclass(kind) and isinstance(kind, type):
        yield from _keys(kind, f"{name}.")
    elif get_origin(kind) is dict and isinstance(member := content(get_args(kind)[1]), type) and is_dataclass(member):
        yield Key(f"{name}.{ANY}", member, MISSING, (inspect.getdoc(member) or "").splitlines()[0])
        yield from _keys(member, f"{name}.{ANY}.")
    elif get_origin(kind) is dict:
        yield Key(f"{name}.{ANY}", get_args(kind)[1], MISSING, "")


def _meanings(kind: type) -> dict[str, str]:
    """Read the section ``Attributes:`` of a docstring and of those that the class builds on."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        section = re.search(r"^Attributes:\n((?:[ ]{4}.*\n?|\n)*)", inspect.cleandoc(base.__doc__ or ""), re.MULTILINE)
        for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section[1] if section else "", re.MULTILINE):
            meanings[name] = " ".join(text.split())
    return meanings
