"""torchvision's data sets, read from torchvision's own files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sophon.config import DomainConfig
from sophon.domains.bundled import DIGITS, GARMENTS
from sophon.domains.decoding import open_image
from sophon.domains.part import Part, data_root
from sophon.errors import UserError, choose, one_line
from sophon.paths import exists


class _Faces:
    """CelebA's aligned images, the square middle of each; one class, its annotations are not used."""

    classes = ("face",)

    def __init__(self, listed: Any) -> None:
        self._folder = Path(listed.root) / listed.base_folder / "img_align_celeba"
        self._names = list(listed.filename)  # not the annotations: they take ten times the memory
        self.targets = [0] * len(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image = open_image(str(self._folder / self._names[index]))
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return image.crop((left, top, left + side, top + side)), self.targets[index]


class _Torchvision(NamedTuple):
    """How torchvision opens a data set.

    Attributes:
        path: what is under ``root`` when the data set is there.
        name: of torchvision's class.
        sides: what tells it the training and the test side.
        classes: its class names where torchvision has none, or others than the bundled subset of the same data set.
        more: its other arguments.
        seen_as: makes the data set of it.
    """

    path: str
    name: str
    sides: tuple[Any, Any] = ("train", "test")
    classes: tuple[str, ...] | None = None
    more: Mapping[str, Any] = {}
    seen_as: Callable[[Any], Any] = lambda dataset: dataset


# CIFAR's own format is a pickle. torchvision unpickles it only after the md5 of each file is that of the original.
TORCHVISION = {
    "cifar10": _Torchvision("cifar-10-batches-py", "CIFAR10", (True, False)),
    "cifar100": _Torchvision("cifar-100-python", "CIFAR100", (True, False)),
    "stl10": _Torchvision("stl10_binary", "STL10"),
    "mnist": _Torchvision("MNIST/raw", "MNIST", (True, False), DIGITS),
    "fashion_mnist": _Torchvision("FashionMNIST/raw", "FashionMNIST", (True, False), GARMENTS),
    "svhn": _Torchvision("train_32x32.mat", "SVHN", classes=DIGITS),
    "imagenette": _Torchvision(
        "imagenette2-160", "Imagenette", ("train", "val"), more={"size": "160px", "loader": open_image}
    ),
    "celeba": _Torchvision("celeba/img_align_celeba", "CelebA", more={"target_type": []}, seen_as=_Faces),
}


def torchvision_sets(config: DomainConfig, where: str) -> tuple[Part, Part]:
    """Open a data set of torchvision's; fetch it first where ``config.download`` says so.

    Raises:
        UserError: it is not known, not there, damaged, or cannot be fetched.
    """
    choose(f"{where}.dataset", config.dataset, TORCHVISION)
    root, path = data_root(config, where), TORCHVISION[config.dataset].path
    if not config.download and not exists(root / path, f"{where}.root"):
        raise UserError(
            f"{where}.root: {config.dataset} not found, there is no {root / path}; "
            f"set {where}.download=true or point {where}.root at the folder that {path} lies in"
        )
    legacy = root / Path(path).parent / "processed" / "training.pt"
    if exists(legacy, f"{where}.root"):  # torchvision would prefer it to the raw files, and unpickle it unchecked
        raise UserError(f"{where}.root: {legacy.parent} is torchvision's old pickled copy of the data; delete it")
    return _torchvision_part(config, root, True, where), _torchvision_part(config, root, False, where)


def _torchvision_part(config: DomainConfig, root: Path, train: bool, where: str) -> Part:
    from torchvision import datasets  # slow to import, and most runs have other data

    known = TORCHVISION[config.dataset]
    try:
        opened = getattr(datasets, known.name)(root, known.sides[not train], download=config.download, **known.more)
        dataset = known.seen_as(opened)
        labels, classes = _labels(dataset), known.classes or _class_names(dataset)
        if len(labels) != len(dataset) or not all(0 <= label < len(classes) for label in labels):
            raise ValueError(f"{len(dataset)} images do not match {len(labels)} labels of {len(classes)} classes")
    except Exception as error:  # torchvision's readers raise almost anything for a damaged file
        if isinstance(error.__context__, ModuleNotFoundError):  # torchvision then says which package to install
            raise UserError(f"{where}.download: {config.dataset} cannot be fetched: {one_line(error)}") from error
        key, verb = ("download", "fetched or read") if config.download else ("root", "read")
        raise UserError(
            f"{where}.{key}: {config.dataset} in {root} cannot be {verb}: {one_line(error)}; "
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
