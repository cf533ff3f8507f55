"""Atomic writes: files and folders that are either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sophon.errors import UserError
from sophon.paths import exists, explained, is_folder


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes.

    Raises:
        UserError: the file cannot be read.
    """
    with explained(path, "read"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it holds all of ``data`` or, on any failure, what it held before.

    Raises:
        UserError: the file system refuses (full, read-only, not permitted, ...).
    """
    path = Path(path)
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does; what UTF-8 cannot hold (lone surrogates) is written as an escape."""
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: str | Path, obj: object) -> None:
    """Write ``obj`` as indented JSON as `write_bytes` does.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
        UserError: see `write_bytes`.
    """
    write_text(path, json.dumps(obj, indent=2, sort_keys=False, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: it is missing, unreadable or not JSON.
    """
    with explained(path, "read"):
        data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:  # covers both malformed JSON and bytes that are not UTF-8
        raise UserError(f"cannot read {path}: it is truncated or not JSON") from error


@contextlib.contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block ends without an exception.

    An existing ``target`` is replaced whole, and left as it was if the block or the replacement fails.

    Raises:
        UserError: ``target`` is not a folder, or the file system refuses.
    """
    with explained(target, "write"):
        target = Path(target).resolve()  # a symbolic link stays one: what it points to is replaced
    if exists(target) and not is_folder(target):
        raise UserError(f"cannot write {target}: a file that is not a folder is in the way")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    with explained(target, "write"):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    try:
        with explained(target, "write"):
            yield temporary
            _swap(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``; if that fails, ``target`` is back where it was."""
    if not exists(target):
        new.replace(target)
        return
    aside = new.with_suffix(".old")
    target.replace(aside)
    try:
        new.replace(target)
    except BaseException:
        aside.replace(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
