"""The same images, as every source has them; small image files of any kind; and what loading them gives."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from sophon.config import DomainConfig
from sophon.domains import Domain, LoadedDomain, load_restricted, load_source
from sophon.domains.sources import Loaded
from sophon.errors import UserError

SIDE = 28
COUNTS = {"train": 24, "test": 6}


def pixels(side: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise, and the labels 0 and 1, in the order of the labels."""
    count = COUNTS[side]
    images = np.random.default_rng(count).integers(0, 256, (count, SIDE, SIDE), dtype=np.uint8)
    return images, np.arange(count) * 2 // count


class Pairs(Dataset[tuple[Any, Any]]):
    """A torch Dataset of (image, label)."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.items = list(zip(images, labels, strict=True))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.items[index]


@dataclass
class Names:
    """The feature of Hugging Face's that has class names."""

    names: list[str] | None


class Table:
    """What of a Hugging Face Dataset is used."""

    def __init__(self, names: list[str] | None = None, **columns: Any) -> None:
        self.columns = columns
        self.column_names = list(columns)
        self.features = {name: Names(names) if name.startswith("label") else object() for name in columns}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, key: str | int) -> Any:
        if isinstance(key, str):
            return self.columns[key]
        return {name: column[key] for name, column in self.columns.items()}


def pictures(side: str) -> list[Image.Image]:
    return [Image.fromarray(image) for image in pixels(side)[0]]


def floats(side: str) -> torch.Tensor:
    return torch.from_numpy(pixels(side)[0]).float()[:, None] / 255


def write_files(root: Path, name: Callable[[str, int, int], str]) -> DomainConfig:
    for side in COUNTS:
        for number, (image, label) in enumerate(zip(*pixels(side), strict=True)):
            path = root / name(side, number, label)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return DomainConfig(name="x", source="imagefolder", root=str(root))


def write_folder(root: Path) -> DomainConfig:
    return write_files(root, lambda side, number, label: f"{side}/{label}/{number:02}.png")


def write_listed(
    root: Path, write: Callable[[Path, list[dict[str, Any]]], None], *, labels: bool = True, captions: bool = False
) -> DomainConfig:
    """Write images with a list beside them; classes are in the list, or else in the folders' names."""

    def name(number: int, label: int) -> str:
        return f"{'all' if labels else label}/{number:02}.png"

    config = write_files(root, lambda side, number, label: f"{side}/{name(number, label)}")
    for side in COUNTS:
        rows: list[dict[str, Any]] = []
        for number, label in enumerate(pixels(side)[1]):
            rows.append({"file_name": name(number, label)})
            if labels:
                rows[-1]["label"] = int(label)
            if captions:
                rows[-1]["text"] = f"{side} {number}"
        write(root / side, rows)
    return config


def write_one_list(root: Path, write: Callable[[Path, list[dict[str, Any]]], None]) -> DomainConfig:
    """Write the images of both sides into one folder, with a list of them all."""
    config = write_files(root, lambda side, number, label: f"images/{side}{number:02}.png")
    labels = [(side, number, int(label)) for side in COUNTS for number, label in enumerate(pixels(side)[1])]
    write(root, [{"file_name": f"images/{s}{n:02}.png", "label": label, "split": s} for s, n, label in labels])
    return config


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def write_idx(path: Path, array: NDArray[np.uint8]) -> None:
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(root: Path) -> DomainConfig:
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for side, name in (("train", "train"), ("test", "t10k")):
        images, labels = pixels(side)
        write_idx(folder / f"{name}-images-idx3-ubyte", images)
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels.astype(np.uint8))
    return DomainConfig(name="x", source="torchvision", dataset="mnist", root=str(root), classes=["0", "1"])


def write_bundled(root: Path) -> DomainConfig:
    arrays = {
        f"{side}_{kind}": array
        for side in COUNTS
        for kind, array in zip(("images", "labels"), pixels(side), strict=True)
    }
    np.savez(root / "mnist.npz", **arrays)  # type: ignore[arg-type]
    return DomainConfig(name="x", source="bundled", dataset="mnist", classes=["0", "1"])


def of(make: Callable[[str], Any], **settings: Any) -> Callable[[Path], DomainConfig]:
    return lambda root: Domain(make("train"), make("test"), name="x", **settings)


def loaded(config: DomainConfig, memory_gb: float = 1.0, load: Any = load_restricted) -> LoadedDomain:
    return load(config, image_size=SIDE, channels=1, where="it", memory_gb=memory_gb)


def save_image(path: Path, color: object, size: tuple[int, int] = (8, 8), mode: str = "RGB", **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)  # type: ignore[arg-type]


def write_pets(root: Path, train: int = 4, test: int = 2) -> DomainConfig:
    """Write two classes, cat and dog; the red channel is 10 times the label plus the image's number."""
    for side, count in (("train", train), ("test", test)):
        for label, name in enumerate(("cat", "dog")):
            for number in range(count):
                save_image(root / side / name / f"{number}.png", (10 * label + number, 50, 100))
    return DomainConfig(name="pets", source="imagefolder", root=str(root))


def load(config: DomainConfig, image_size: int = 8, channels: int = 3) -> Loaded:
    return load_source(config, image_size=image_size, channels=channels, where="domain.original")


def refused(config: DomainConfig, image_size: int = 8, channels: int = 3) -> str:
    """Return the one line with which loading is refused."""
    with pytest.raises(UserError) as caught:
        load(config, image_size, channels)
    message = str(caught.value)
    message.encode()  # can be printed
    assert message.isprintable()
    return message
