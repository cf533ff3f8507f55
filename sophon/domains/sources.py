"""Where a data set comes from: shipped with the package, read by torchvision, or a folder of image files.

A source gives two `Part` objects, which know every label but decode an image only when asked; so the class subset and
the limits of a `DomainConfig` are applied first, and a large folder costs no more than what is kept of it. Pillow does
every conversion and resize: its arithmetic on 8-bit images is integer, so the pixels, and with them the hashes of the
splits, are the same on every machine.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from sophon.config import DomainConfig
from sophon.domains.types import ImageSet
from sophon.errors import UserError, choose

_DIGITS = tuple("0123456789")
_GARMENTS = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
_MODES = {1: "L", 3: "RGB"}


class Part(NamedTuple):
    """The training or the test side of a data set, not decoded yet.

    Attributes:
        labels: the class number of every image, each in 0 .. len(classes) - 1.
        classes: the class names.
        read: decodes the image of a number in 0 .. len(labels) - 1.
    """

    labels: Sequence[int]
    classes: tuple[str, ...]
    read: Callable[[int], Image.Image]


def load_source(config: DomainConfig, *, image_size: int, channels: int, where: str) -> tuple[ImageSet, ImageSet]:
    """Load what ``config`` asks for of a data set.

    Args:
        config: the data set, the classes to keep and the limits per class.
        image_size: height and width in pixels that every image is stretched to (bilinear, antialiased).
        channels: 1 or 3; grey images are repeated, colour ones reduced to their luminance (ITU-R 601).
        where: the configuration key of ``config``, for messages, such as ``domain.restricted``.

    Returns:
        The training and the test images, on the CPU, in the data set's own order. Class k is the k-th of
        ``config.classes``, or of the data set's own classes.

    Raises:
        UserError: a value is not allowed, or the data is missing or damaged.
    """
    choose(f"{where}.source", config.source, SOURCES)
    _validate(config, image_size, channels, where)
    train, test = SOURCES[config.source](config, where)
    selections = _select(train, config, "train", where), _select(test, config, "test", where)
    train_images, test_images = (
        _decode(part, indices, labels, config, (channels, image_size, image_size))
        for part, (indices, labels) in zip((train, test), selections, strict=True)
    )
    return train_images, test_images


def _validate(config: DomainConfig, image_size: int, channels: int, where: str) -> None:
    if image_size < 1:
        raise UserError(f"model.image_size: {image_size} is not allowed; it must be >= 1")
    if channels not in _MODES:
        raise UserError(f"model.channels: {channels} is not allowed; it must be 1 or 3")
    for name in ("per_class", "test_per_class"):
        limit = getattr(config, name)
        if limit is not None and limit < 1:
            raise UserError(f"{where}.{name}: {limit} is not allowed; it must be >= 1, or null for all")
    if config.classes is not None and (not config.classes or len(set(config.classes)) < len(config.classes)):
        raise UserError(f"{where}.classes: {config.classes} is not allowed; name each class once, or null for all")


def _kept_classes(part: Part, config: DomainConfig) -> tuple[str, ...]:
    return part.classes if config.classes is None else tuple(config.classes)


def _select(part: Part, config: DomainConfig, side: str, where: str) -> tuple[Tensor, Tensor]:
    """Return which images of ``part`` are kept, in their order, and their labels among the kept classes."""
    limit = config.per_class if side == "train" else config.test_per_class
    numbers = torch.as_tensor(part.labels, dtype=torch.int64)
    chosen = torch.full_like(numbers, -1)
    for label, name in enumerate(_kept_classes(part, config)):
        choose(f"{where}.classes", name, part.classes)
        members = (numbers == part.classes.index(name)).nonzero().flatten()
        if not len(members):
            raise UserError(f"{where}.classes: there is no {side} image of '{name}'; name other classes")
        # A generator for each class: what is drawn of one does not depend on which others are kept.
        order = torch.randperm(len(members), generator=class_generator(config.split_seed, side, name))
        chosen[members[order[:limit]]] = label
    indices = (chosen >= 0).nonzero().flatten()
    return indices, chosen[indices]


def _decode(part: Part, indices: Tensor, labels: Tensor, config: DomainConfig, shape: tuple[int, int, int]) -> ImageSet:
    images = torch.empty((len(indices), *shape), dtype=torch.uint8)
    for row, index in enumerate(indices.tolist()):
        images[row] = _to_tensor(part.read(index), shape)
    return ImageSet(images, labels, _kept_classes(part, config))


def class_generator(seed: int, purpose: str, name: str) -> torch.Generator:
    """Return a CPU generator that depends on all three arguments and nothing else."""
    digest = hashlib.sha256(repr((seed, purpose, name)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def _to_tensor(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    channels, height, width = shape
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image).reshape(height, width, channels)).permute(2, 0, 1)


def _open(path: str, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":  # converting these clips silently
                raise ValueError(f"its pixels have mode {image.mode}, not 8 bits")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    # What Pillow's decoders raise for damaged files; SyntaxError is how its PNG reader says so.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}.root: the image {path} cannot be read: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# --- bundled: package data, see data/README.md --------------------------------------------------------------------

_DATA = importlib.resources.files("sophon.domains") / "data"


class _Bundled(NamedTuple):
    sha256: str
    classes: tuple[str, ...]


BUNDLED = {
    "fashion_mnist": _Bundled("4e82a7b006241a5cf3bf6a81f4697e0fef50b7471235c3ce1d98c8a24bdba380", _GARMENTS),
    "mnist": _Bundled("171b11f2f0f23273df396e83ae2bce6a2d2a754d13fa125a9382077a90a3a899", _DIGITS),
}


def _bundled(config: DomainConfig, where: str) -> tuple[Part, Part]:
    choose(f"{where}.dataset", config.dataset, BUNDLED)
    bundled, file = BUNDLED[config.dataset], _DATA / f"{config.dataset}.npz"
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{where}.dataset: {file} cannot be read ({error}); install sophon again") from error
    if hashlib.sha256(data).hexdigest() != bundled.sha256:
        raise UserError(
            f"{where}.dataset: {file} is damaged (its sha256 is not {bundled.sha256}); install sophon again"
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return _array_part(arrays, "train", bundled.classes), _array_part(arrays, "test", bundled.classes)


def _array_part(arrays: Any, side: str, classes: tuple[str, ...]) -> Part:
    images = arrays[f"{side}_images"]
    return Part(arrays[f"{side}_labels"].tolist(), classes, lambda index: Image.fromarray(images[index]))


# --- torchvision ----------------------------------------------------------------------------------------------------


class _Torchvision(NamedTuple):
    """How torchvision opens a data set.

    Attributes:
        path: what is under ``root`` when the data set is there.
        make: the data set of (root, is it the training side, may it download, opens an image file).
        classes: its class names where torchvision has none, or others than the bundled subset of the same data set.
    """

    path: str
    make: Callable[[Path, bool, bool, Callable[[str], Image.Image]], Any]
    classes: tuple[str, ...] | None = None


def _split(train: bool, other: str = "test") -> str:
    return "train" if train else other


class _CelebA:
    """CelebA's aligned images, the square middle of each; one class, its annotations are not used."""

    classes = ("face",)

    def __init__(self, root: Path, train: bool, fetch: bool, loader: Callable[[str], Image.Image]) -> None:
        listed = datasets.CelebA(root, _split(train), target_type=[], download=fetch)
        self._folder = root / listed.base_folder / "img_align_celeba"
        self._names = list(listed.filename)  # not the annotations: they take ten times the memory
        self._loader = loader
        self.targets = [0] * len(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = self._loader(str(self._folder / self._names[index]))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side)), self.targets[index]


# CIFAR's own format is a pickle. torchvision unpickles it only after the md5 of each file is that of the original.
TORCHVISION = {
    "cifar10": _Torchvision(
        "cifar-10-batches-py", lambda root, train, fetch, _: datasets.CIFAR10(root, train, download=fetch)
    ),
    "cifar100": _Torchvision(
        "cifar-100-python", lambda root, train, fetch, _: datasets.CIFAR100(root, train, download=fetch)
    ),
    "stl10": _Torchvision(
        "stl10_binary", lambda root, train, fetch, _: datasets.STL10(root, _split(train), download=fetch)
    ),
    "mnist": _Torchvision(
        "MNIST/raw", lambda root, train, fetch, _: datasets.MNIST(root, train, download=fetch), _DIGITS
    ),
    "fashion_mnist": _Torchvision(
        "FashionMNIST/raw", lambda root, train, fetch, _: datasets.FashionMNIST(root, train, download=fetch), _GARMENTS
    ),
    "svhn": _Torchvision(
        "train_32x32.mat", lambda root, train, fetch, _: datasets.SVHN(root, _split(train), download=fetch), _DIGITS
    ),
    "imagenette": _Torchvision(
        "imagenette2-160",
        lambda root, train, fetch, loader: datasets.Imagenette(
            root, _split(train, "val"), "160px", download=fetch, loader=loader
        ),
    ),
    "celeba": _Torchvision("celeba/img_align_celeba", _CelebA),
}


def _torchvision(config: DomainConfig, where: str) -> tuple[Part, Part]:
    choose(f"{where}.dataset", config.dataset, TORCHVISION)
    root, path = Path(config.root).expanduser(), TORCHVISION[config.dataset].path
    if not config.download and not (root / path).exists():
        raise UserError(
            f"{where}.root: {config.dataset} not found, there is no {root / path}; "
            f"set {where}.download=true or point {where}.root at the folder that {path} lies in"
        )
    legacy = root / Path(path).parent / "processed" / "training.pt"
    if legacy.exists():  # torchvision would prefer it to the raw files, and unpickle it unchecked
        raise UserError(f"{where}.root: {legacy.parent} is torchvision's old pickled copy of the data; delete it")
    return _torchvision_part(config, root, True, where), _torchvision_part(config, root, False, where)


def _torchvision_part(config: DomainConfig, root: Path, train: bool, where: str) -> Part:
    known = TORCHVISION[config.dataset]
    try:
        dataset = known.make(root, train, config.download, partial(_open, where=where))
        labels, classes = _labels(dataset), known.classes or _class_names(dataset)
        if len(labels) != len(dataset) or not all(0 <= label < len(classes) for label in labels):
            raise ValueError(f"{len(dataset)} images do not match {len(labels)} labels of {len(classes)} classes")
    except Exception as error:  # torchvision's readers raise almost anything for a damaged file
        if isinstance(error.__context__, ModuleNotFoundError):  # torchvision then says which package to install
            raise UserError(f"{where}.download: {config.dataset} cannot be fetched: {_one_line(error)}") from error
        key, verb = ("download", "fetched or read") if config.download else ("root", "read")
        raise UserError(
            f"{where}.{key}: {config.dataset} in {root} cannot be {verb}: {_one_line(error)}; "
            f"delete it and fetch it again with {where}.download=true"
        ) from error
    return Part(labels, classes, lambda index: dataset[index][0])


def _labels(dataset: Any) -> list[int]:
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return [int(label) for label in getattr(dataset, name)]
    return [label for _, label in dataset._samples]


def _class_names(dataset: Any) -> tuple[str, ...]:
    # Imagenette gives each class a tuple of synonyms.
    return tuple(name if isinstance(name, str) else name[0] for name in dataset.classes)


# --- imagefolder ----------------------------------------------------------------------------------------------------


def _imagefolder(config: DomainConfig, where: str) -> tuple[Part, Part]:
    if config.dataset:
        raise UserError(f"{where}.dataset: '{config.dataset}' is not allowed; leave it empty for an image folder")
    root = Path(config.root).expanduser()
    tests = [root / name for name in ("test", "val", "valid") if (root / name).is_dir()]
    if not (root / "train").is_dir() or not tests:
        missing = "train" if not (root / "train").is_dir() else "test (nor val, nor valid)"
        raise UserError(
            f"{where}.root: there is no folder {missing} in {root}; give root/train/CLASS and root/test/CLASS"
        )
    flat = config.labels == "none" and not any(entry.is_dir() for entry in _listed(root / "train", where))
    read = _flat_part if flat else _folder_part
    train, test = read(root / "train", where), read(tests[0], where)
    if train.classes != test.classes:
        differing = ", ".join(sorted(set(train.classes) ^ set(test.classes)))
        raise UserError(f"{where}.root: train and {tests[0].name} of {root} differ in the classes {differing}")
    return train, test


def _folder_part(folder: Path, where: str) -> Part:
    try:
        dataset = datasets.ImageFolder(folder, loader=partial(_open, where=where))
    except OSError as error:  # no class folder, one without an image, or one that may not be listed
        raise UserError(f"{where}.root: {folder}: {_one_line(error)}") from error
    return Part(dataset.targets, tuple(dataset.classes), lambda index: dataset[index][0])


def _flat_part(folder: Path, where: str) -> Part:
    """Read a folder that holds the images themselves: one class."""
    paths = [str(path) for path in _listed(folder, where) if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS]
    if not paths:
        raise UserError(f"{where}.root: there is no image in {folder}")
    return Part([0] * len(paths), ("image",), lambda index: _open(paths[index], where))


def _listed(folder: Path, where: str) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{where}.root: {folder}: {_one_line(error)}") from error


SOURCES: dict[str, Callable[[DomainConfig, str], tuple[Part, Part]]] = {
    "bundled": _bundled,
    "torchvision": _torchvision,
    "imagefolder": _imagefolder,
}
