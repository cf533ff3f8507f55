"""Data sets that are shipped with the package; see data/README.md."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sophon.config import DomainConfig
from sophon.domains.part import Part
from sophon.errors import UserError, choose

DIGITS = tuple("0123456789")
GARMENTS = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
_DATA = importlib.resources.files("sophon.domains") / "data"


class _Bundled(NamedTuple):
    sha256: str
    classes: tuple[str, ...]


BUNDLED = {
    "fashion_mnist": _Bundled("4e82a7b006241a5cf3bf6a81f4697e0fef50b7471235c3ce1d98c8a24bdba380", GARMENTS),
    "mnist": _Bundled("171b11f2f0f23273df396e83ae2bce6a2d2a754d13fa125a9382077a90a3a899", DIGITS),
}


def bundled_set(config: DomainConfig, where: str) -> tuple[Part, Part]:
    """Open a data set of the package.

    Raises:
        UserError: it is not known, or its file is damaged.
    """
    choose(f"{where}.dataset", config.dataset, BUNDLED)
    known, file = BUNDLED[config.dataset], _DATA / f"{config.dataset}.npz"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where}.dataset: {file} cannot be read ({error}); install sophon again") from error
    if hashlib.sha256(data).hexdigest() != known.sha256:
        raise UserError(f"{where}.dataset: {file} is damaged (its sha256 is not {known.sha256}); install sophon again")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return _side(arrays, "train", known.classes), _side(arrays, "test", known.classes)


def _side(arrays: Any, side: str, classes: tuple[str, ...]) -> Part:
    images = arrays[f"{side}_images"]
    return Part(arrays[f"{side}_labels"].tolist(), classes, lambda index: Image.fromarray(images[index]))
