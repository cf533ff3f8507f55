"""Labels as they stand in the data, and the classes that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from sophon.domains.names import escaped, few, is_writable
from sophon.domains.part import Part
from sophon.errors import UserError


@dataclass(frozen=True)
class Side:
    """The training or the test side of a data set.

    Attributes:
        labels: as they stand in the data: whole numbers or strings.
        names: names of the labels 0, 1, ...; None if the data has none.
        read: as of a `Part`.
        left_out: as of a `Part`.
        texts: as of a `Part`.
    """

    labels: Sequence[Any]
    names: Sequence[str] | None
    read: Callable[[int], Image.Image]
    left_out: Mapping[str, int] = field(default_factory=dict)
    texts: Sequence[str] | None = None


def labelled(sides: Sequence[Side], class_names: Sequence[str] | None, who: str) -> list[Part]:
    """Number the classes of both sides of a data set.

    They are ``class_names``, or the names that the data has; without names the labels themselves, whole numbers by
    value and strings by their characters.

    Args:
        class_names: names of the labels 0, 1, ... in place of those that the data has.

    Raises:
        UserError: a label is of no class, or of another type than a whole number or a string.
    """
    names = class_names or sides[0].names
    values = _values((label for side in sides for label in side.labels), names, who)
    classes = tuple(str(value) for value in (names or values))
    if unwritable := [name for name in classes if not is_writable(name)]:
        raise UserError(f"{who}: the class name {escaped(unwritable[0])} is not UTF-8 or has control characters")
    places = {value: place for place, value in enumerate(values)}
    return [
        Part([places[label] for label in side.labels], classes, side.read, side.left_out, side.texts) for side in sides
    ]


def plain(labels: Any) -> list[Any]:
    """Return labels as Python's own numbers and strings where they are NumPy's or torch's scalars."""
    scalars = (np.generic, torch.Tensor)
    return [label.item() if isinstance(label, scalars) and label.ndim == 0 else label for label in labels]


def _values(labels: Iterable[Any], names: Sequence[str] | None, who: str) -> list[Any]:
    """Return what labels may be, in the order of the classes."""
    present = set()
    for label in labels:
        if isinstance(label, bool) or not isinstance(label, (int, str)):
            raise UserError(
                f"{who}: a label of type {type(label).__name__} is not allowed; give numbers 0, 1, ... or names"
            )
        present.add(label)
    if len({type(label) for label in present}) > 1:
        raise UserError(f"{who}: some labels are numbers and some are names; give one or the other")
    if names is None:
        return sorted(present)
    values: list[Any] = list(range(len(names))) if all(isinstance(label, int) for label in present) else list(names)
    if unknown := sorted(present - set(values)):
        raise UserError(f"{who}: the label {unknown[0]!r} is none of the {len(names)} classes {few(map(str, names))}")
    return values
