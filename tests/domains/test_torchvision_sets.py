"""torchvision's data sets, each read from a tiny copy in its own format on disk.

torchvision compares the md5 of CIFAR's, STL-10's, SVHN's and CelebA's files with those of the originals before it opens
them, which no small copy can pass: there, and only there, the comparison is replaced by a look whether the file exists.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.io
import torch
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets

from sophon.config import DomainConfig
from sophon.domains import load_source, torchvision_sets
from sophon.domains.sources import Loaded
from sophon.errors import UserError

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


def write_idx(path: Path, array: Pixels) -> None:
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


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


@pytest.fixture
def any_md5(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (datasets.cifar, datasets.stl10, datasets.svhn, datasets.celeba):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


def config_of(dataset: str, root: Path) -> DomainConfig:
    return DomainConfig(name="x", source="torchvision", dataset=dataset, root=str(root))


def load(config: DomainConfig, size: int = 32, channels: int = 3) -> Loaded:
    return load_source(config, image_size=size, channels=channels, where="domain.restricted")


def refused(config: DomainConfig) -> str:
    with pytest.raises(UserError) as caught:
        load(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_data_set_has_a_writer() -> None:
    assert set(WRITERS) == set(torchvision_sets.TORCHVISION)


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


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("dataset", [name for name in WRITERS if name not in ("mnist", "fashion_mnist", "svhn")])
def test_without_a_subset_the_sets_own_classes_are_kept(dataset: str, tmp_path: Path) -> None:
    WRITERS[dataset](tmp_path)
    assert load(config_of(dataset, tmp_path))[0].classes == NAMES[dataset]


@pytest.mark.parametrize("dataset", WRITERS)
def test_absent_data_names_the_way_out(dataset: str, tmp_path: Path) -> None:
    message = refused(config_of(dataset, tmp_path))
    assert message.startswith(f"domain.restricted.root: {dataset} not found, there is no {tmp_path}")
    assert "set domain.restricted.download=true or point domain.restricted.root at" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10", "svhn", "celeba"])
def test_files_that_are_not_the_originals_are_refused(dataset: str, tmp_path: Path) -> None:
    WRITERS[dataset](tmp_path)
    message = refused(config_of(dataset, tmp_path))
    assert message.startswith(
        f"domain.restricted.root: {dataset} in {tmp_path} cannot be read: Dataset not found or corr"
    )


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


@pytest.mark.parametrize("file", ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
@pytest.mark.parametrize("keep", [0, 6, -1])
def test_truncated_mnist(file: str, keep: int, tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / file
    path.write_bytes(path.read_bytes()[:keep])
    assert f"domain.restricted.root: mnist in {tmp_path} cannot be read: " in refused(config_of("mnist", tmp_path))


def test_missing_file_of_a_set(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    assert "mnist in " in refused(config_of("mnist", tmp_path))


@pytest.mark.parametrize("labels", [[0, 10], [0, 1, 1]], ids=["unknown class", "too many"])
def test_labels_that_do_not_fit_the_images(labels: list[int], tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_idx(tmp_path / "MNIST" / "raw" / "train-labels-idx1-ubyte", np.array(labels, dtype=np.uint8))
    assert f"2 images do not match {len(labels)} labels of 10 classes" in refused(config_of("mnist", tmp_path))


def test_a_class_without_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert refused(config_of("mnist", tmp_path)) == (
        "domain.restricted.classes: there is no train image of '2', '3', '4', '5', ...; name other classes"
    )


def test_damaged_imagenette_image_is_named(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    path = tmp_path / "imagenette2-160" / "val" / "n01440764" / "a.JPEG"
    path.write_bytes(path.read_bytes()[:100])
    assert f"the image {path} cannot be read: " in refused(config_of("imagenette", tmp_path))


def test_imagenette_with_a_foreign_class_folder(tmp_path: Path) -> None:
    write_imagenette(tmp_path)
    (tmp_path / "imagenette2-160" / "train" / "n99999999").mkdir()
    assert "imagenette in " in refused(config_of("imagenette", tmp_path))


@pytest.mark.usefixtures("any_md5")
def test_celeba_keeps_the_square_middle_and_its_proportions(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    pixels = np.zeros((218, 178, 3), dtype=np.uint8)
    pixels[20:109] = 200  # of the square that is kept, the upper half
    Image.fromarray(pixels).save(tmp_path / "celeba" / "img_align_celeba" / "000001.jpg", quality=100)
    rows = load(config_of("celeba", tmp_path), 16)[0].images[0].float().mean(dim=(0, 2))
    assert rows[:8].min() > 150
    assert rows[8:].max() < 50


@pytest.mark.usefixtures("any_md5")
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_celeba_image_is_named(damage: str, tmp_path: Path) -> None:
    write_celeba(tmp_path)
    path = tmp_path / "celeba" / "img_align_celeba" / "000005.jpg"
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    message = refused(config_of("celeba", tmp_path))
    assert message.startswith(f"domain.restricted.root: the image {path} cannot be read: ")


@pytest.mark.usefixtures("any_md5")
def test_only_the_images_of_celeba_that_are_kept_are_decoded(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    limited = replace(config_of("celeba", tmp_path), per_class=1, test_per_class=1)
    expected = [side.sha256() for side in load(limited)[:2]]
    needed = []
    for path in sorted((tmp_path / "celeba" / "img_align_celeba").iterdir()):
        whole = path.read_bytes()
        path.write_bytes(b"damaged")
        try:
            assert [side.sha256() for side in load(limited)[:2]] == expected
        except UserError:
            needed.append(path.name)
            path.write_bytes(whole)
    assert len(needed) == 2


@pytest.mark.usefixtures("any_md5")
def test_celeba_with_damaged_annotations(tmp_path: Path) -> None:
    write_celeba(tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("000001.jpg zero")
    assert f"celeba in {tmp_path} cannot be read: " in refused(config_of("celeba", tmp_path))


def test_fetching_celeba_without_gdown_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gdown", None)  # importing it fails as if it were not installed
    message = refused(replace(config_of("celeba", tmp_path), download=True))
    assert message.startswith("domain.restricted.download: celeba cannot be fetched: ")
    assert message.endswith("'gdown' is required. You can install it with 'pip install gdown'.")


@pytest.mark.usefixtures("any_md5")
def test_download_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(self: datasets.CIFAR10) -> None:
        if not asked:
            write_cifar10(Path(self.root))
        asked.append(Path(self.root))

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    refused(config_of("cifar10", tmp_path / "new"))
    assert asked == []
    assert len(load(replace(config_of("cifar10", tmp_path / "new"), download=True))[0]) == 10
    assert set(asked) == {tmp_path / "new"}


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(self: datasets.CIFAR10) -> None:
        raise URLError("no route\nto host")

    monkeypatch.setattr(datasets.CIFAR10, "download", fetch)
    message = refused(replace(config_of("cifar10", tmp_path), download=True))
    assert message.startswith("domain.restricted.download: cifar10 in ")
    assert "cannot be fetched or read: <urlopen error no route to host>" in message


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "images")
    config = replace(config_of("mnist", Path("~/images")), classes=["1", "0"])
    assert load(config, 28, 1)[0].labels.tolist() == [0, 1]
