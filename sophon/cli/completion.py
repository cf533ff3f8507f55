"""Completion for bash: verbs, groups and their choices, keys."""

from __future__ import annotations

import re

from sophon.cli.groups import ROLES, choices, groups
from sophon.cli.listing import LISTS
from sophon.config.keys import ANY, content, find, keys
from sophon.verbs import VERBS

# bash parts words at these, and replaces only what follows the last of them
_BREAKS = re.compile(r".*[=:@]")
BASH = """_sophon() {
    local IFS=$'\\n'
    COMPREPLY=($(sophon --complete "${COMP_LINE:0:COMP_POINT}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *[=.] ]] && compopt -o nospace
}
complete -o default -F _sophon sophon"""
_FLAGS = ("--help", "--cfg", "--multirun", "--config-dir")


def complete(line: str) -> list[str]:
    """Return the completions of a command line's last word, for bash."""
    *before, word = re.split(r"\s+", line.lstrip())
    kept = _BREAKS.match(word)
    return [
        candidate[kept.end() if kept else 0 :] for candidate in _words(before[1:], word) if candidate.startswith(word)
    ]


def _words(before: list[str], word: str) -> list[str]:
    if not before:
        return [*VERBS, "list", "init", "--help", "--version", "--completion"]
    if before[0] == "list":
        return [*LISTS]
    if before[-1] in ("--help", "-h"):
        return [*groups(), *keys(), "strategy", "run"]
    signs = word[: len(word) - len(word.lstrip("+"))]
    name, equals, _ = word.removeprefix(signs).partition("=")
    if equals:
        return [f"{signs}{name}={value}" for value in _values(name)]
    return [*_FLAGS, *(signs + name for name in _names(name.count(".")))]


def _names(depth: int) -> list[str]:
    """Return groups and keys with so many dots, and ``=`` or, where there are keys below, ``.`` after them."""
    known = [name for name in keys() if ANY not in name]
    insides = {name.rpartition(".")[0] for name in known} - {""}
    takers = [*groups(), *(f"domain@domain.{role}" for role in ROLES), *(name for name in known if name not in insides)]
    names = [*(f"{name}=" for name in takers), *(f"{name}." for name in insides)]
    return sorted(name for name in names if name[:-1].count(".") == depth or "@" in name)


def _values(name: str) -> list[str]:
    group = name.partition("@")[0]
    if group in groups():
        return choices(group)
    key = find(name)
    if key is None:
        return []
    return ["true", "false"] if content(key.type) is bool else list(key.choices)
