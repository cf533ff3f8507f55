"""Run directories, seeds, and files that are either whole or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sophon.errors import UserError
from sophon.paths import explained

_METADATA_KEY = "sophon"
_RUN_FORMAT = 1


def sha256_file(path: str | Path) -> str:
    """Return the hexadecimal sha256 of a file's bytes.

    Raises:
        UserError: the file cannot be read.
    """
    with explained(path, "read"), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def derive_seed(*parts: object) -> int:
    """Return a seed in 0 .. 2**63 - 1 that depends on the ``repr`` of every part: the same in every process."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def resolve_device(name: str) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device; ``auto`` prefers CUDA.

    Raises:
        UserError: the name is unknown or this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or (":" in name and not (index.isascii() and index.isdigit()))):
        raise UserError(f"device: '{name}' is not known; allowed: auto, cpu, cuda, cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise UserError(f"device: '{name}' is not available; this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file so that it holds all of ``data`` or, on any failure, what it held before.

    Raises:
        UserError: the file system refuses (full, read-only, not permitted, ...).
    """
    path = Path(path)
    with explained(path, "write"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode())


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
    except ValueError as error:  # covers both malformed JSON and bytes that are not UTF-8
        raise UserError(f"cannot read {path}: it is truncated or not JSON") from error


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None
) -> None:
    """Write tensors as a safetensors file, as `write_bytes` does.

    Args:
        path: the file.
        tensors: on any device, of any memory format; views and shared storage are written out in full.
        metadata: plain JSON data kept in the file's header.

    Raises:
        UserError: see `write_bytes`.
    """
    # clone: safetensors refuses tensors that share storage; contiguous_format: and those in channels_last.
    plain = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    header = {_METADATA_KEY: json.dumps(dict(metadata), allow_nan=False)} if metadata is not None else {}
    # Hub tools (transformers among them) refuse a file whose header does not say which framework wrote it.
    write_bytes(path, save(plain, metadata={"format": "pt", **header}))


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: tensors on the CPU, and the metadata (empty if none was given).

    Raises:
        UserError: the file is missing, unreadable, truncated or corrupt.
    """
    try:
        with explained(path, "read"), safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return tensors, json.loads(metadata.get(_METADATA_KEY, "{}"))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"cannot read {path}: it is truncated or not a safetensors file") from error


@contextlib.contextmanager
def atomic_directory(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that becomes ``target`` when the block ends without an exception.

    An existing ``target`` is replaced whole, and left as it was if the block or the replacement fails.

    Raises:
        UserError: ``target`` is not a folder, or the file system refuses.
    """
    target = Path(target).resolve()  # a symbolic link stays one: what it points to is replaced
    if target.exists() and not target.is_dir():
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
    if not target.exists():
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


@dataclass(frozen=True)
class RunDirectory:
    """A folder that belongs to one run: ``run.json`` says which, so that no other run goes on in it.

    Attributes:
        path: the folder.
    """

    path: Path

    @classmethod
    def open(cls, path: str | Path, verb: str, identity: Mapping[str, Any]) -> RunDirectory:
        """Make the folder, or return to the one that the same run made before.

        Args:
            path: the folder.
            verb: the command that runs.
            identity: everything that decides the run's results, plain JSON data.

        Raises:
            UserError: the folder belongs to another run, holds foreign files or cannot be written.
        """
        path = Path(path)
        identity = json.loads(json.dumps(identity, allow_nan=False))
        with explained(path, "write"):
            path.mkdir(parents=True, exist_ok=True)
            # A first start that died while it wrote run.json leaves only a hidden temporary file.
            empty = all(entry.name.startswith(".run.json.") for entry in path.iterdir())
        record = path / "run.json"
        if record.exists():
            cls._check(path, read_json(record), verb, identity)
        elif not empty:
            raise UserError(f"run_dir: '{path}' is not empty and holds no run.json; give an empty or a new folder")
        else:
            canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
            fingerprint = hashlib.sha256(canonical.encode()).hexdigest()
            head = {"format_version": _RUN_FORMAT, "verb": verb, "fingerprint": fingerprint}
            write_json(record, {**head, "identity": identity})
        return cls(path)

    @staticmethod
    def _check(path: Path, found: Any, verb: str, identity: Mapping[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("format_version") != _RUN_FORMAT:
            raise UserError(
                f"run_dir: '{path / 'run.json'}' is not of format version {_RUN_FORMAT}; give another run_dir"
            )
        if found.get("verb") != verb:
            raise UserError(
                f"run_dir: '{path}' belongs to verb '{found.get('verb')}', not '{verb}'; give another run_dir"
            )
        difference = _first_difference(found.get("identity"), identity)
        if difference is not None:
            key, old, new = difference
            raise UserError(f"run_dir: '{path}' was made with {key}={old}, now {key}={new}; give another run_dir")


_ABSENT = object()


def _first_difference(old: Any, new: Any, key: str = "") -> tuple[str, str, str] | None:
    """Return the dotted key of the first leaf in which two JSON values differ, and both values as text."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *(name for name in old if name not in new)]:
            below = f"{key}.{name}" if key else name
            found = _first_difference(old.get(name, _ABSENT), new.get(name, _ABSENT), below)
            if found is not None:
                return found
        return None
    if old == new:
        return None
    was, now = ("absent" if value is _ABSENT else json.dumps(value) for value in (old, new))
    return key or "identity", was, now
