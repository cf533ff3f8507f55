"""Tiny copies of torchvision's data sets in their own formats."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.io
from numpy.typing import NDArray
from PIL import Image

from tests.domains.made import write_idx

Pixels = NDArray[np.uint8]


def noise(count: int, *shape: int) -> Pixels:
    return np.random.default_rng(count).integers(0, 256, (count, *shape), dtype=np.uint8)


def write_cifar(folder: Path, files: list[str], meta: str, key: str, label_key: str, classes: list[str]) -> Pixels:
    folder.mkdir(parents=True)
    images = noise(2 * len(files), 3, 32, 32)
    for at, name in enumerate(files):
        entry = {"data": images[2 * at : 2 * at + 2].reshape(2, -1), label_key: [1, 0]}
        (folder / name).write_bytes(pickle.dumps(entry))
    (folder / meta).write_bytes(pickle.dumps({key: classes}))
    return images


def write_cifar10(root: Path) -> tuple[Pixels, Pixels]:
    files = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    images = write_cifar(root / "cifar-10-batches-py", files, "batches.meta", "label_names", "labels", ["plane", "car"])
    return images[:-2], images[-2:]


def write_cifar100(root: Path) -> tuple[Pixels, Pixels]:
    folder, key = root / "cifar-100-python", "fine_label_names"
    images = write_cifar(folder, ["train", "test"], "meta", key, "fine_labels", ["apple", "bee"])
    return images[:2], images[2:]


def write_stl10(root: Path) -> tuple[Pixels, Pixels]:
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    images = noise(4, 3, 96, 96)
    for side, part in (("train", images[:2]), ("test", images[2:])):
        part.transpose(0, 1, 3, 2).tofile(folder / f"{side}_X.bin")  # column by column
        np.array([2, 1], dtype=np.uint8).tofile(folder / f"{side}_y.bin")  # counted from 1
    (folder / "unlabeled_X.bin").touch()
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    return images[:2], images[2:]


def write_mnist(root: Path, name: str = "MNIST") -> tuple[Pixels, Pixels]:
    folder = root / name / "raw"
    folder.mkdir(parents=True)
    images = noise(4, 28, 28)
    for side, part in (("train", images[:2]), ("t10k", images[2:])):
        write_idx(folder / f"{side}-images-idx3-ubyte", part)
        write_idx(folder / f"{side}-labels-idx1-ubyte", np.array([1, 0], dtype=np.uint8))
    return images[:2, None], images[2:, None]


def write_svhn(root: Path) -> tuple[Pixels, Pixels]:
    root.mkdir(parents=True, exist_ok=True)
    images = noise(4, 3, 32, 32)
    for side, part in (("train", images[:2]), ("test", images[2:])):
        labels = np.array([[1], [10]], dtype=np.uint8)  # 10 is the digit 0
        scipy.io.savemat(root / f"{side}_32x32.mat", {"X": part.transpose(2, 3, 1, 0), "y": labels})
    return images[:2], images[2:]


def write_imagenette(root: Path) -> tuple[Pixels, Pixels]:
    images = []
    for side in ("train", "val"):
        for number, wnid in enumerate(("n01440764", "n02102040")):
            folder = root / "imagenette2-160" / side / wnid
            folder.mkdir(parents=True)
            Image.new("RGB", (160, 200), (40 * number, 100, 200)).save(folder / "a.JPEG", quality=100)
            images.append(np.asarray(Image.open(folder / "a.JPEG").resize((32, 32))).transpose(2, 0, 1))
    # In the order of the labels 1, 0 that the other sets have.
    return np.stack(images[:2])[::-1], np.stack(images[2:])[::-1]


def write_celeba(root: Path) -> tuple[Pixels, Pixels]:
    """Two images a side, and between them two of the side that is not used."""
    folder = root / "celeba"
    (folder / "img_align_celeba").mkdir(parents=True)
    sides, images = [0, 0, 1, 1, 2, 2], []
    names = [f"{number:06}.jpg" for number in range(1, 1 + len(sides))]
    for name, pixels in zip(names, noise(len(sides), 218, 178, 3), strict=True):
        path = folder / "img_align_celeba" / name
        Image.fromarray(pixels).save(path)
        images.append(np.asarray(Image.open(path))[20:198].transpose(2, 0, 1))
    partition = [f"{name} {side}" for name, side in zip(names, sides, strict=True)]
    annotations = [str(len(names)), "one two", *(f"{name}  -1 1" for name in names)]
    for file in ("list_attr_celeba", "list_bbox_celeba", "list_landmarks_align_celeba"):
        (folder / f"{file}.txt").write_text("\n".join(annotations))
    for file in ("list_eval_partition", "identity_CelebA"):
        (folder / f"{file}.txt").write_text("\n".join(partition))
    return np.stack(images[:2]), np.stack(images[4:])


WRITERS: dict[str, Callable[[Path], tuple[Pixels, Pixels]]] = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "stl10": write_stl10,
    "mnist": write_mnist,
    "fashion_mnist": lambda root: write_mnist(root, "FashionMNIST"),
    "svhn": write_svhn,
    "imagenette": write_imagenette,
    "celeba": write_celeba,
}
NATIVE_SIZE = {"stl10": 96, "mnist": 28, "fashion_mnist": 28, "celeba": 178}
NAMES = {
    "cifar10": ("plane", "car"),
    "cifar100": ("apple", "bee"),
    "stl10": ("airplane", "bird"),
    "mnist": ("0", "1"),
    "fashion_mnist": ("t_shirt", "trouser"),
    "svhn": ("0", "1"),
    "imagenette": ("tench", "English springer"),
    "celeba": ("face",),
}
