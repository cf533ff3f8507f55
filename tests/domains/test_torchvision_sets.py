"""torchvision's data sets, each read from a tiny copy in its own format on disk.

torchvision compares the md5 of CIFAR's, STL-10's, SVHN's and CelebA's files with those of the originals before it opens
them, which no small copy can pass: there, and only there, the comparison is replaced by a look whether the file exists.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from sophon.config import DomainConfig
from tests.domains.made import load, refused, write_idx
from tests.domains.torchvision_files import NAMES, NATIVE_SIZE, WRITERS, write_cifar10, write_mnist

OWN_NAMES = [name for name in WRITERS if name not in ("mnist", "fashion_mnist", "svhn")]
CHECKED = ["cifar10", "cifar100", "stl10", "svhn", "celeba"]  # by torchvision, by their md5


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (datasets.cifar, datasets.stl10, datasets.svhn, datasets.celeba):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def config_of(dataset: str, root: Path) -> DomainConfig:
    return DomainConfig(name="x", source="torchvision", dataset=dataset, root=str(root))


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("dataset", WRITERS)
def test_pixels_labels_and_names(dataset: str, tmp_path: Path) -> None:
    written = WRITERS[dataset](tmp_path)
    config = replace(config_of(dataset, tmp_path), classes=list(NAMES[dataset]))
    read = load(config, NATIVE_SIZE.get(dataset, 32), written[0].shape[1])
    for images, pixels in zip(read[:2], written, strict=True):
        assert images.classes == NAMES[dataset]
        order = images.labels.argsort(descending=True, stable=True)
        expected_labels = [1, 0] * (len(pixels) // 2) if len(images.classes) == 2 else [0] * len(pixels)
        assert sorted(images.labels.tolist()) == sorted(expected_labels)
        expected = torch.from_numpy(pixels.copy())[torch.tensor(expected_labels).argsort(descending=True, stable=True)]
        # A JPEG resized with another filter differs by a rounding.
        assert (images.images[order].int() - expected.int()).abs().max() <= (2 if dataset == "imagenette" else 0)
    if dataset in OWN_NAMES:
        assert load(replace(config, classes=None), 8).train.classes == NAMES[dataset]


@pytest.mark.parametrize("dataset", WRITERS)
def test_absent_data_names_the_way_out(dataset: str, tmp_path: Path) -> None:
    message = refused(config_of(dataset, tmp_path))
    assert message.startswith(f"domain.original.root: {dataset} not found, there is no {tmp_path}")
    assert "set domain.original.download=true or point domain.original.root at" in message
    assert list(tmp_path.iterdir()) == []


class _Exploit:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_foreign_pickle_is_never_opened(tmp_path: Path) -> None:
    write_cifar10(tmp_path)
    harmful = pickle.dumps(_Exploit(tmp_path / "harmed"))
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        path.write_bytes(harmful)
    refused(config_of("cifar10", tmp_path))
    legacy = tmp_path / "MNIST" / "processed"
    write_mnist(tmp_path)
    legacy.mkdir()
    for name in ("training.pt", "test.pt"):
        (legacy / name).write_bytes(harmful)
    assert "old pickled copy of the data; delete it" in refused(config_of("mnist", tmp_path))
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("dataset", CHECKED)
def test_files_that_are_not_the_originals_are_refused(dataset: str, tmp_path: Path) -> None:
    WRITERS[dataset](tmp_path)
    assert f"{dataset} in {tmp_path} cannot be read: Dataset not found or corr" in refused(config_of(dataset, tmp_path))


def cut(name: str, keep: int) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:keep])


def labels(*values: int) -> Callable[[Path], object]:
    return lambda root: write_idx(root / "MNIST/raw/train-labels-idx1-ubyte", np.array(values, dtype=np.uint8))


PARTITION = "celeba/list_eval_partition.txt"
DAMAGED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "empty images": ("mnist", cut("MNIST/raw/train-images-idx3-ubyte", 0), "cannot be read: "),
    "cut labels": ("mnist", cut("MNIST/raw/train-labels-idx1-ubyte", 6), "cannot be read: "),
    "cut test images": ("mnist", cut("MNIST/raw/t10k-images-idx3-ubyte", -1), "cannot be read: "),
    "missing file": ("mnist", lambda root: (root / "MNIST/raw/t10k-labels-idx1-ubyte").unlink(), "mnist in "),
    "unknown class": ("mnist", labels(0, 10), "2 images do not match 2 labels of 10 classes"),
    "too many labels": ("mnist", labels(0, 1, 1), "2 images do not match 3 labels of 10 classes"),
    "classes without images": ("mnist", lambda root: None, "there is no train image of '2', '3', '4', '5', ...; name"),
    "cut JPEG": ("imagenette", cut("imagenette2-160/val/n01440764/a.JPEG", 100), "n01440764/a.JPEG cannot be read: "),
    "foreign class": ("imagenette", lambda root: (root / "imagenette2-160/train/n99999999").mkdir(), "imagenette in "),
    "cut face": ("celeba", cut("celeba/img_align_celeba/000005.jpg", 3000), "000005.jpg cannot be read: "),
    "missing face": (
        "celeba",
        lambda root: (root / "celeba/img_align_celeba/000001.jpg").unlink(),
        "000001.jpg cannot",
    ),
    "annotations": ("celeba", lambda root: (root / PARTITION).write_text("000001.jpg zero"), "cannot be read: "),
}


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    dataset, damage, said = DAMAGED[name]
    WRITERS[dataset](tmp_path)
    damage(tmp_path)
    assert said in refused(config_of(dataset, tmp_path))


def test_fetching_celeba_without_gdown_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)  # importing it fails as if it were not installed
    message = refused(replace(config_of("celeba", tmp_path), download=True))
    assert message.startswith("domain.original.download: celeba cannot be fetched: ")
    assert message.endswith("'gdown' is required. You can install it with 'pip install gdown'.")


@pytest.mark.usefixtures("any_md5")
def test_download_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(self: datasets.CIFAR10) -> None:
        if not asked:
            write_cifar10(Path(self.root))
        asked.append(Path(self.root))

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    config = config_of("cifar10", tmp_path / "new")
    refused(config)
    assert asked == []
    assert len(load(replace(config, download=True)).train) == 10
    assert set(asked) == {tmp_path / "new"}


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: datasets.CIFAR10) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    message = refused(replace(config_of("cifar10", tmp_path), download=True))
    assert message.startswith("domain.original.download: cifar10 in ")
    assert "cannot be fetched or read: <urlopen error no route to host>" in message
