"""`sophon list`: the shipped files of a group, and one's own, with a line on each."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from sophon.cli.groups import choices, groups, roots
from sophon.errors import UserError, choose

# What people say, and the groups that it stands for.
LISTS = {
    "methods": ("method",),
    "attacks": ("attack", "attack/family"),
    "models": ("model",),
    "domains": ("domain",),
    "experiments": ("experiment",),
    "samplers": ("sampler",),
}

_USE = {"domain": "domain@domain.restricted=NAME", "attack/family": "attack/family=[NAME,...]"}
_WIDTH = 100


def listing(arguments: Sequence[str]) -> str:
    """Return what ``sophon list WORD [--config-dir DIR]`` prints: each choice with its file's first comment.

    Raises:
        UserError: the word is not known, or there is more than that.
    """
    words = [argument for argument in arguments if not argument.startswith("--config-dir")]
    at = arguments.index("--config-dir") if "--config-dir" in arguments else None
    searched = [argument.partition("=")[2] for argument in arguments if argument.startswith("--config-dir=")]
    if at is not None and at + 1 < len(arguments):
        searched.append(arguments[at + 1])
        words.remove(arguments[at + 1])
    if len(words) != 1:
        raise UserError(f"list: give one of {', '.join(LISTS)}, as in `sophon list methods`")
    choose("list", words[0], LISTS)
    shown = [group for group in LISTS[words[0]] if group in groups(searched)]
    return "\n\n".join(_group(group, searched) for group in shown)


def _group(group: str, searched: Sequence[str]) -> str:
    names = choices(group, searched)
    width = max(map(len, names))
    use = _USE.get(group, f"{group}=NAME")
    return "\n".join([use, *(f"  {name:{width}}  {_meaning(group, name, searched)}".rstrip() for name in names)])


def _meaning(group: str, name: str, searched: Sequence[str]) -> str:
    """Return the first sentence of the comment that a file begins with."""
    [path, *_] = [file for root in roots(searched) if (file := Path(root / group / f"{name}.yaml")).exists()]
    comment = ""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        comment += line.lstrip("#") + " "
    return textwrap.shorten(re.split(r"(?<=\.)\s", comment, maxsplit=1)[0].rstrip(". "), _WIDTH, placeholder=" ...")
