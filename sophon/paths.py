"""File-system queries whose errors become one-line messages."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sophon.errors import UserError


@contextmanager
def explained(path: str | Path, action: str, key: str = "") -> Iterator[None]:
    """Turn an `OSError` of the block into a `UserError`: ``KEY: cannot ACTION PATH: reason``."""
    try:
        yield
    except OSError as error:
        raise refusal(error, path, action, key) from error


def refusal(error: OSError, path: str | Path, action: str, key: str = "") -> UserError:
    """Return the one-line `UserError` that says what the file system refused."""
    reason = "no such file or folder" if isinstance(error, FileNotFoundError) else _reason(error)
    return UserError(f"{f'{key}: ' if key else ''}cannot {action} {path}: {reason}")


def unexpected(error: OSError) -> str:
    """Return the one line that a refusal becomes which nothing else explained."""
    return f"{error.filename}: {_reason(error)}" if error.filename else _reason(error)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())


def exists(path: str | Path, key: str = "") -> bool:
    """Return whether there is anything at ``path``; a broken link is nothing.

    Raises:
        UserError: the file system cannot say (a name that is too long, a folder that may not be searched, a loop of
            links, ...); the message begins with ``key``.
    """
    return _mode(path, key) is not None


def is_folder(path: str | Path, key: str = "") -> bool:
    """Return whether ``path`` is a folder or a link to one; see `exists` for what is raised."""
    mode = _mode(path, key)
    return mode is not None and stat.S_ISDIR(mode)


def require_folder(path: str | Path, key: str) -> None:
    """Raise a `UserError` that names ``key`` unless ``path`` is a folder; see `exists` for what else is raised."""
    if not is_folder(path, key):
        raise UserError(f"{key}: there is no folder {path}; give one that is there")


def is_file(path: str | Path, key: str = "") -> bool:
    """Return whether ``path`` is a regular file or a link to one; see `exists` for what is raised."""
    mode = _mode(path, key)
    return mode is not None and stat.S_ISREG(mode)


def entries(folder: str | Path, key: str = "") -> list[Path]:
    """Return what lies in a folder, sorted by name.

    Raises:
        UserError: it is no folder or may not be listed.
    """
    with explained(folder, "read", key):
        return sorted(Path(folder).iterdir())


def _mode(path: str | Path, key: str) -> int | None:
    try:
        return os.stat(path).st_mode  # noqa: PTH116 - Path's own questions hide some refusals and raise the others
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise refusal(error, path, "read", key) from error
    except ValueError as error:  # a null character, or one that the file system's encoding lacks
        raise UserError(f"{f'{key}: ' if key else ''}cannot read {str(path)!r}: {_reason(error)}") from error
