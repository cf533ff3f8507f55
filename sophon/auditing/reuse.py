"""Copy results from another audit: a job's file, with the attempts and the pictures that belong to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sophon.errors import UserError
from sophon.files import read_json, write_bytes, write_json
from sophon.paths import exists, is_file, is_folder


class Reused:
    """The run directories of other audits, whose results are copied where a job's file has the same name.

    Args:
        others: the run directories, the first that has a file counting.
        exposure: of a strategy as plain data, in this audit: what replaces the other's.

    Raises:
        UserError: one of ``others`` is not a folder.
    """

    def __init__(
        self, others: Sequence[str], folder: Path, exposure: Callable[[Mapping[str, Any]], dict[str, Any]]
    ) -> None:
        for other in others:
            if not is_folder(other, "attack.reuse"):
                raise UserError(f"attack.reuse: '{other}' is not a folder; give the run directories of other audits")
        self.others = [Path(other) for other in others]
        self.folder = folder
        self.exposure = exposure

    def take_over(self, path: Path) -> None:
        """Copy the job whose file is to be ``path``, if one of the other audits has it.

        Raises:
            UserError: it lacks one of its pictures.
        """
        for other in self.others:
            source = other / path.relative_to(self.folder)
            if exists(source, "attack.reuse"):
                self._copy(other, read_json(source), path)
                return

    def _copy(self, other: Path, record: dict[str, Any], path: Path) -> None:
        """Copy a job's result with all that belongs to it; its own file last."""
        for identifier in record.get("attempts", ()):
            name = f"attempts/{identifier}.json"
            self._copy(other, read_json(other / name), self.folder / name)
        for picture in record.get("samples", ()):
            file = other / picture["file"]
            if not is_file(file):
                raise UserError(f"attack.reuse: an attempt in '{other}' lacks its picture '{file.name}'; leave it out")
            write_bytes(self.folder / picture["file"], file.read_bytes())
        if "strategy" in record:
            record |= self.exposure(record["strategy"])
        write_json(path, record)
