"""Run folders: each belongs to one run, as its ``run.json`` says, and to one process at a time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sophon.errors import UserError
from sophon.files import read_json, write_json
from sophon.locks import holder, lock
from sophon.paths import entries, exists, explained, is_folder

_FORMAT = 1
_LOCK, _RECORD = ".lock", "run.json"


@contextlib.contextmanager
def run_folder(path: str | Path, verb: str, identity: Mapping[str, Any], part: str = "") -> Iterator[Path]:
    """Make a run's folder, or return to the one that the same run made before; own it while the block runs.

    A folder in which another run of the verb has saved nothing is taken over, and a line on stderr says so.

    Args:
        identity: everything that decides the run's results, plain JSON data.
        part: see `owned`.

    Raises:
        UserError: the folder belongs to another run, is in use, holds foreign files or cannot be written.
    """
    plain = json.loads(json.dumps(identity, allow_nan=False))
    with owned(path, part) as folder:
        with lock(folder / f"{_LOCK}.record", wait=True):  # parts begin at the same time
            _begin(folder, verb, plain, alone=not part)
        if not part:
            _tidy(folder)
        yield folder


@contextlib.contextmanager
def owned(path: str | Path, part: str = "", key: str = "run_dir") -> Iterator[Path]:
    """Own a folder while the block runs, making it if need be; what is new and still empty is gone afterwards.

    Args:
        part: own this part only, beside processes that own others; empty for all of the folder.

    Raises:
        UserError: another process owns it, or it cannot be written.
    """
    folder = Path(path)
    new = [parent for parent in (folder, *folder.parents) if not exists(parent, key)]
    with explained(folder, "write", key):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as locks:
            _claim(locks, folder / _LOCK, folder, key, shared=bool(part))
            if part:
                _claim(locks, folder / f"{_LOCK}.{part}", folder, key)
            yield folder
    finally:
        with contextlib.suppress(OSError):  # one holds something
            for parent in new:
                parent.rmdir()


@contextlib.contextmanager
def owned_place(path: str | Path, key: str = "out") -> Iterator[None]:
    """Own the place of a folder that is going to be replaced as a whole, as `owned` does; the lock lies beside it."""
    target = Path(path)
    with explained(target, "write", key):
        target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as locks:
        _claim(locks, target.with_name(f".{target.name}{_LOCK}"), target, key)
        yield


def _claim(locks: contextlib.ExitStack, path: Path, folder: Path, key: str, *, shared: bool = False) -> None:
    try:
        locks.enter_context(lock(path, shared=shared))
    except BlockingIOError as error:
        owner = holder(path) or "other processes"
        raise UserError(
            f"{key}: '{folder}' is in use by {owner}; wait until that has ended, or give another {key}"
        ) from error


def refuse_another(path: str | Path, verb: str, decided: Mapping[str, Any]) -> None:
    """Refuse what `run_folder` will refuse, as far as a part of the identity decides it; nothing is read or loaded.

    Args:
        decided: keys of the identity that are known already, plain JSON data.

    Raises:
        UserError: a run of the verb with another value has saved its work in the folder.
    """
    record = Path(path) / _RECORD
    if exists(record, "run_dir") and _holds_work(Path(path)):
        recorded = read_json(record)
        others = recorded.get("identity", {}) if isinstance(recorded, dict) else {}
        _check(Path(path), recorded, verb, {**others, **json.loads(json.dumps(decided))})


def _holds_work(folder: Path) -> bool:
    """Return whether there is more than a record: a start that died left at most that, locks and a part of it."""
    return any(not entry.name.startswith((_LOCK, _RECORD, f".{_RECORD}.")) for entry in entries(folder, "run_dir"))


def _begin(folder: Path, verb: str, identity: dict[str, Any], alone: bool) -> None:
    record = folder / _RECORD
    if exists(record):
        try:
            _check(folder, read_json(record), verb, identity)
            return
        except _OtherSettingsError as refusal:
            if not alone or _holds_work(folder):
                raise
            print(f"{str(refusal).rpartition(';')[0]}; nothing was saved there, so it starts anew", file=sys.stderr)
    elif _holds_work(folder):
        raise UserError(f"run_dir: '{folder}' is not empty and holds no {_RECORD}; give an empty or a new folder")
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
    head = {"format_version": _FORMAT, "verb": verb, "fingerprint": fingerprint}
    write_json(record, {**head, "identity": identity})


def _tidy(folder: Path) -> None:
    """Delete what a process that was killed had begun to write."""
    for entry in entries(folder):
        if fnmatch(entry.name, ".*.tmp") or fnmatch(entry.name, f"{_LOCK}.*"):
            if is_folder(entry):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entry.unlink(missing_ok=True)


class _OtherSettingsError(UserError):
    """The folder belongs to a run of the same verb with other settings."""


def _check(folder: Path, record: Any, verb: str, identity: Mapping[str, Any]) -> None:
    if not isinstance(record, dict) or record.get("format_version") != _FORMAT:
        raise UserError(f"run_dir: '{folder / _RECORD}' is not of format version {_FORMAT}; give another run_dir")
    if record.get("verb") != verb:
        raise UserError(
            f"run_dir: '{folder}' belongs to verb '{record.get('verb')}', not '{verb}'; give another run_dir"
        )
    difference = _first_difference(record.get("identity"), identity)
    if difference is not None:
        key, old, new = difference
        raise _OtherSettingsError(
            f"run_dir: '{folder}' was made with {key}={old}, now {key}={new}; give another run_dir"
        )


_ABSENT = object()


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return the dotted key of the first leaf in which two JSON values differ, and both values as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            below = f"{key}.{name}" if key else name
            difference = _first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), below)
            if difference is not None:
                return difference
        return None
    if old == new:
        return None
    was, now = ("absent" if value is _ABSENT else json.dumps(value) for value in (old, new))
    return key or "identity", was, now
