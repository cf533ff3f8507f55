"""The errors that end a run on purpose; the command line turns them into one line and an exit code."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """The user's input is wrong. The message is one line: what, where, what is allowed. Exit code 2."""


class GuardError(Exception):
    """No checkpoint keeps the original domain within the guard's tolerance. Exit code 3."""


class GateError(Exception):
    """An audit is done, and does not come to what was asked for. Exit code 4."""


def choose(key: str, value: str, allowed: Iterable[object]) -> None:
    """Raise a `UserError` that names ``key`` and what was likely meant unless ``value`` is one of ``allowed``."""
    names = sorted(map(str, allowed))
    if value not in names:
        raise UserError(f"{key}: '{value}' is not known{likely(value, names)}; allowed: {', '.join(names)}")


def likely(value: str, names: Iterable[str]) -> str:
    """Ask whether the user meant one of ``names``; empty if none is like ``value``."""
    close = difflib.get_close_matches(str(value), list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of at most 200 characters; its class where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
