"""The two ways in which a run ends badly on purpose; the command line turns them into one line and an exit code."""

from __future__ import annotations


class UserError(Exception):
    """The user's input is wrong. The message is one line: what, where, what is allowed. Exit code 2."""


class GuardError(Exception):
    """No checkpoint keeps the original domain within the guard's tolerance. Exit code 3."""


def choose(key: str, value: str, allowed: object) -> None:
    """Raise a `UserError` unless ``value`` is one of ``allowed`` (any iterable of strings).

    ``key`` is the configuration key that the message names.
    """
    names = sorted(str(name) for name in allowed)  # type: ignore[attr-defined]
    if value not in names:
        raise UserError(f"{key}: '{value}' is not known; allowed: {', '.join(names)}")


def one_line(error: BaseException) -> str:
    """Return an error's message on one line of at most 200 characters; its class where it has none."""
    return " ".join(str(error).split())[:200] or type(error).__name__
