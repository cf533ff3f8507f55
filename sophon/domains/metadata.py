"""``metadata.csv`` and ``metadata.jsonl``: images and labels of a folder, as in Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from sophon.domains.names import escaped, few
from sophon.errors import UserError, one_line
from sophon.paths import explained

METADATA_FILES = ("metadata.csv", "metadata.jsonl")


class Listed(NamedTuple):
    """Image files, their labels as they stand in the list, their captions if it has them, their column ``split``."""

    paths: list[str]
    labels: list[Any]
    texts: list[str] | None
    splits: list[Any]


def read_metadata(file: Path, key: str) -> Listed:
    """Read which images a folder has, their labels and their captions.

    Args:
        file: ``metadata.csv`` or ``metadata.jsonl`` beside the images: the columns ``file_name``, a path below the
            folder, and ``label``, a name or a whole number; and optionally ``text``, a caption. Where no row has a
            label but all have captions, as in data sets for text-to-image models, the label is the folder that the
            path begins with, ``image`` without one.

    Raises:
        UserError: the file cannot be read, or has a row without these; the message names the row.
    """
    with explained(file, "read", key):
        try:
            rows = list(_rows(file.read_text(encoding="utf-8-sig"), file.suffix))
        except (csv.Error, ValueError, RecursionError) as error:
            raise UserError(f"{key}: {file} cannot be read: {one_line(error)}") from error
    if not rows:
        raise UserError(f"{key}: {file} lists no image; give a row an image, with the columns file_name and label")
    paths, labels, texts, labelled = [], [], [], dict[str, Any]()
    captions = all(isinstance(row, dict) and isinstance(row.get("text"), str) for row in rows)
    unlabelled = captions and not any("label" in row for row in rows)
    for number, row in enumerate(rows, 1):
        name, label = (row.get(column) if isinstance(row, dict) else None for column in ("file_name", "label"))
        if unlabelled and isinstance(name, str):
            label = next(iter(PurePosixPath(name).parts[:-1]), "image")
        if not isinstance(name, str) or label is None or label == "":
            columns = escaped(few(str(column) for column in row if column)) if isinstance(row, dict) else "no columns"
            raise UserError(
                f"{key}: row {number} of {file} has no file_name or no label; give these two columns (it has {columns})"
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise UserError(f"{key}: row {number} of {file} names an image outside of the folder; give paths below it")
        paths.append(str(file.parent / name))
        labels.append(label)
        if labelled.setdefault(paths[-1], label) != label:
            raise UserError(f"{key}: row {number} of {file} gives '{name}' a second label; give one an image")
        if captions:
            texts.append(row["text"])
    numbered = _numbers(labels) if file.suffix == ".csv" else labels
    return Listed(paths, numbered, texts if captions else None, [row.get("split") for row in rows])


def _rows(text: str, suffix: str) -> Iterator[Any]:
    if suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        columns = [column for column in table.fieldnames or () if column]
        if len(set(columns)) < len(columns):
            raise ValueError(f"two columns have the same name ({escaped(few(columns))})")
        return iter(table)
    return (json.loads(line) for line in text.splitlines() if line.strip())


def _numbers(labels: Iterable[str]) -> list[Any]:
    """Return a table's labels as whole numbers if all of them are, for tables have no types."""
    labels = list(labels)
    whole = all(re.fullmatch(r"[0-9]{1,18}", label) for label in labels)
    return [int(label) for label in labels] if whole else labels
