"""torchvision's data sets, read from torchvision's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sophon.config import DomainConfig
from sophon.domains.bundled import DIGITS, GARMENTS
from sophon.domains.decoding import one_line, open_image
from sophon.domains.part import Part, data_root
from sophon.errors import UserError, choose
from sophon.paths import exists


class _Torchvision(NamedTuple):
    """How torchvision opens a data set.

    Attributes:
        path: what is under ``root`` when the data set is there.
        make: the data set of (torchvision.datasets, root, is it the training side, may it fetch, opens a file).
        classes: its class names where torchvision has none, or others than the bundled subset of the same data set.
    """

    path: str
    make: Callable[[Any, Path, bool, bool, Callable[[str], Image.Image]], Any]
    classes: tuple[str, ...] | None = None


def _split(train: bool, other: str = "test") -> str:
    return "train" if train else other


class _CelebA:
    """CelebA's aligned images, the square middle of each; one class, its annotations are not used."""

    classes = ("face",)

    def __init__(
        self, datasets: Any, root: Path, train: bool, fetch: bool, loader: Callable[[str], Image.Image]
    ) -> None:
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
        "cifar-10-batches-py", lambda datasets, root, train, fetch, _: datasets.CIFAR10(root, train, download=fetch)
    ),
    "cifar100": _Torchvision(
        "cifar-100-python", lambda datasets, root, train, fetch, _: datasets.CIFAR100(root, train, download=fetch)
    ),
    "stl10": _Torchvision(
        "stl10_binary", lambda datasets, root, train, fetch, _: datasets.STL10(root, _split(train), download=fetch)
    ),
    "mnist": _Torchvision(
        "MNIST/raw", lambda datasets, root, train, fetch, _: datasets.MNIST(root, train, download=fetch), DIGITS
    ),
    "fashion_mnist": _Torchvision(
        "FashionMNIST/raw",
        lambda datasets, root, train, fetch, _: datasets.FashionMNIST(root, train, download=fetch),
        GARMENTS,
    ),
    "svhn": _Torchvision(
        "train_32x32.mat",
        lambda datasets, root, train, fetch, _: datasets.SVHN(root, _split(train), download=fetch),
        DIGITS,
    ),
    "imagenette": _Torchvision(
        "imagenette2-160",
        lambda datasets, root, train, fetch, loader: datasets.Imagenette(
            root, _split(train, "val"), "160px", download=fetch, loader=loader
        ),
    ),
    "celeba": _Torchvision("celeba/img_align_celeba", _CelebA),
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
        dataset = known.make(datasets, root, train, config.download, open_image)
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
