"""Data sets at hand in Python: torch Datasets, arrays, Hugging Face Datasets, folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from PIL import Image

from sophon.config import DomainConfig
from sophon.domains.decoding import eight_bit, open_image
from sophon.domains.labels import Side, labelled, plain
from sophon.domains.names import few
from sophon.domains.part import Part, UnreadableError, class_generator
from sophon.errors import UserError, one_line
from sophon.ranges import check

_COLUMNS = ("image", "label")
FORMS = "a folder, a torch Dataset of (image, label), a tuple (images, labels), or a Hugging Face Dataset"


class Domain(DomainConfig):
    """A data set as it is at hand in Python, and which part of it a run uses.

    Images are PIL images, uint8 arrays or tensors ([C, H, W], [H, W, C] or [H, W]), floating ones with values in 0..1,
    or paths; the same index must give the same image every time, so neither augmented nor normalised. Labels are whole
    numbers or strings.

    Args:
        data: the training images: a folder (see `folder.image_folder`); a torch ``Dataset`` or any sequence of
            (image, label); a tuple (images, labels) of arrays or tensors; a Hugging Face ``Dataset`` with
            the columns ``image`` and ``label``, and captions in ``text`` (which may also stand without labels: all
            images are then of one class); or a mapping of these with ``train`` and ``test`` or ``validation``.
        test: the test images, in the same forms; None to set a part of each class of ``data`` aside.
        name: what reports call it.
        class_names: names of the labels 0, 1, ..., where the data has none; None for the labels themselves.
        test_fraction: of ``data`` that is set aside where there is no ``test``.
        settings: other attributes of `DomainConfig`, such as ``classes``, ``per_class``, ``prompt`` or ``fractions``.

    Raises:
        UserError: the data is in none of these forms.
    """

    def __init__(
        self,
        data: object,
        test: object = None,
        *,
        name: str = "data",
        class_names: Sequence[str] | None = None,
        test_fraction: float = 0.2,
        **settings: Any,
    ) -> None:
        folder = isinstance(data, (str, PathLike))
        super().__init__(
            name=name, source="imagefolder" if folder else "python", root=str(data) if folder else "memory", **settings
        )
        check(self, name)
        if isinstance(data, Mapping):
            data, test = _sides(data, name, test)
        if folder and test is not None:
            raise UserError(f"{name}: a folder holds its own test images, in test/CLASS; give no test")
        if not 0 < test_fraction < 1:
            raise UserError(f"{name}: test_fraction={test_fraction} is not allowed; it must be > 0 and < 1")
        self._data, self._test = data, test
        self._class_names, self._test_fraction = class_names, test_fraction

    def parts(self) -> tuple[Part, Part]:
        """Return the training and the test side of data that is no folder.

        Raises:
            UserError: its images or labels are not of the forms that are understood.
        """
        given = [self._data] if self._test is None else [self._data, self._test]
        sides = [_side(data, self.name) for data in given]
        _require_constant(sides[0], self.name)
        train, *tests = labelled(sides, self._class_names, self.name)
        return (train, tests[0]) if tests else self._set_aside(train)

    def _set_aside(self, part: Part) -> tuple[Part, Part]:
        labels = torch.as_tensor(part.labels, dtype=torch.int64)
        aside = torch.zeros(len(labels), dtype=torch.bool)
        for label, name in enumerate(part.classes):
            members = (labels == label).nonzero().flatten()
            order = torch.randperm(len(members), generator=class_generator(self.split_seed, "test", name))
            aside[members[order[: max(1, round(self._test_fraction * len(members)))]]] = True
        return part.take(~aside), part.take(aside)


def _sides(data: Mapping[Any, Any], name: str, test: object) -> tuple[object, object]:
    if "train" not in data:
        raise UserError(f"{name}: of a mapping of data sets 'train' and 'test' are used; it has {few(map(str, data))}")
    tests = [test, *(data[key] for key in ("test", "validation") if key in data)]
    return data["train"], next((side for side in tests if side is not None), None)


def _side(data: Any, name: str) -> Side:
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise UserError(f"{name}: a {type(data).__name__} is not allowed; give {FORMS}")
    if hasattr(data, "column_names") and hasattr(data, "features"):
        return _hugging_face(data, name)
    if isinstance(data, tuple) and len(data) == 2 and all(hasattr(part, "__len__") for part in data):
        images, labels = data
        if len(images) != len(labels):
            raise UserError(f"{name}: {len(images)} images do not match {len(labels)} labels")
        return Side(plain(labels), None, _reader(lambda index: images[index], name))
    if isinstance(data, tuple) and len(data) == 4:
        raise UserError(
            f"{name}: a tuple of 4 is not allowed; give sophon.Domain((images, labels), test=(more, labels))"
        )
    return _dataset(data, name)


def _hugging_face(data: Any, name: str) -> Side:
    columns = [next((column for column in (key, f"{key}s") if column in data.column_names), None) for key in _COLUMNS]
    image, label = columns
    texts = list(data["text"]) if "text" in data.column_names else None
    if image is None or (label is None and texts is None):
        raise UserError(f"{name}: the columns {few(data.column_names)} are not allowed; name them image and label")
    read = _reader(lambda index: data[index][image], name)
    if label is None:
        return Side(["image"] * len(data), None, read, texts=texts)
    return Side(plain(data[label]), getattr(data.features[label], "names", None), read, texts=texts)


def _dataset(data: Any, name: str) -> Side:
    def item(index: int) -> tuple[object, Any]:
        try:
            image, label = data[index]
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: item {index} is no pair (image, label): {one_line(error)}") from error
        return image, plain([label])[0]

    targets = plain(getattr(data, "targets", ()))  # spares decoding every image for its label, but may not be it
    labels = targets if len(targets) == len(data) else [item(index)[1] for index in range(len(data))]

    def image(index: int) -> object:
        value, label = item(index)
        if label != labels[index]:
            raise UserError(f"{name}: item {index} has the label {label!r} and the target {labels[index]!r}")
        return value

    return Side(labels, getattr(data, "classes", None), _reader(image, name))


def _reader(read: Callable[[int], object], name: str) -> Callable[[int], Image.Image]:
    def image(index: int) -> Image.Image:
        try:
            return as_image(read(index))
        except (UnreadableError, UserError):
            raise
        except Exception as error:  # what a data set of somebody else's raises
            raise UnreadableError(f"image {index} of {name} cannot be read: {one_line(error)}") from error

    return image


def _require_constant(side: Side, name: str) -> None:
    try:
        first, again = (np.asarray(side.read(0)) for _ in range(2)) if len(side.labels) else ((), ())
    except UnreadableError:
        return
    if not np.array_equal(first, again):
        raise UserError(f"{name}: image 0 is another one each time; hand the data over without augmentation")


def as_image(value: object) -> Image.Image:
    """Convert an image in one of the forms of `Domain` to mode L or RGB.

    Raises:
        ValueError: it is in none of them; the message says what is allowed.
    """
    if isinstance(value, Image.Image):
        return eight_bit(value)
    if isinstance(value, (str, PathLike)):
        return open_image(str(value))
    if isinstance(value, torch.Tensor):
        pixels = _channels_last(value.detach().cpu().numpy(), first=True)
    elif isinstance(value, np.ndarray):
        pixels = _channels_last(value, first=False)
    else:
        raise ValueError(f"a {type(value).__name__} is no image; give PIL images, arrays, tensors or paths")
    return eight_bit(Image.fromarray(np.ascontiguousarray(_bytes(pixels))))


def _channels_last(pixels: np.ndarray[Any, Any], *, first: bool) -> np.ndarray[Any, Any]:
    """Return pixels as [H, W] or [H, W, 3 or 4]; where both readings are possible ``first`` decides."""
    if pixels.ndim == 2:
        return pixels
    if pixels.ndim == 3:
        for axis in (0, -1) if first else (-1, 0):
            if pixels.shape[axis] in (1, 3, 4):
                moved = np.moveaxis(pixels, axis, -1)
                return moved[..., 0] if moved.shape[-1] == 1 else moved
    raise ValueError(f"its shape is {list(pixels.shape)}; give [C, H, W], [H, W, C] or [H, W] with 1, 3 or 4 channels")


def _bytes(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ValueError(f"its values are {pixels.dtype}; give uint8, or floating ones in 0..1")
    if not (pixels >= 0).all() or not (pixels <= 1).all():
        raise ValueError("its values are not in 0..1; hand floating images over before normalisation")
    rounded: np.ndarray[Any, Any] = np.rint(pixels.astype(np.float64) * 255).astype(np.uint8)
    return rounded
