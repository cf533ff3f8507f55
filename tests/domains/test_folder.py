"""Image folders as they really lie on disks: what is an image, what is a class, and what is said of the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from sophon.config import DomainConfig
from sophon.domains import load_restricted
from tests.domains.made import load, refused, save_image, write_pets

REDS = [10 * label + number for label in range(2) for number in range(4)]


@pytest.fixture
def pets(tmp_path: Path) -> DomainConfig:
    return write_pets(tmp_path)


def copies(folder: Path, target: str) -> None:
    shutil.copytree(folder / "cat", folder / target)


def write_other_name(folder: Path, name: bytes) -> None:
    shutil.copy(folder / "cat" / "0.png", os.fsencode(folder / "cat") + b"/" + name)


# What else may lie in train/, and what is said of it; the images and classes stay as they were.
ODDITIES: dict[str, tuple[Callable[[Path], object], str]] = {
    "hidden folder": (lambda train: copies(train, ".ipynb_checkpoints"), "1 hidden"),
    "resource forks": (lambda train: copies(train, "__MACOSX"), "1 hidden"),
    "thumbnails of a file server": (lambda train: copies(train, "cat/@eaDir"), "1 hidden"),
    "copies of a notebook": (lambda train: copies(train, "dog/.ipynb_checkpoints"), "1 hidden"),
    "twin of a file": (lambda train: (train / "cat" / "._0.png").write_bytes(b"\x00\x05\x16\x07"), "1 hidden"),
    "thumbnails of Windows": (lambda train: (train / "dog" / "Thumbs.db").touch(), "1 .db"),
    "labels beside the images": (lambda train: [(train / "cat" / f"{n}.XML").touch() for n in "01"], "2 .xml"),
    "no suffix": (lambda train: (train / "dog" / "LICENSE").touch(), "1 without a suffix"),
    "video": (lambda train: (train / "dog" / "clip.mpeg").touch(), "1 .mpeg"),
    "document": (lambda train: (train / "dog" / "page.eps").touch(), "1 .eps"),
    "list beside the classes": (lambda train: (train / "list.csv").touch(), "1 .csv"),
    "image beside the classes": (lambda train: save_image(train / "0.png", (1, 1, 1)), "1 beside the class folders"),
    "link to the side": (lambda train: (train / "cat" / "all").symlink_to(train), "1 link to a folder above"),
    "link to the class": (lambda train: (train / "cat" / "again").symlink_to("."), "1 link to a folder above"),
    "link out of the root": (lambda train: (train / "up").symlink_to("/"), "1 link to a folder above"),
    "links in a circle": (
        lambda train: ((train / "cat" / "z").mkdir(), (train / "cat" / "z" / "back").symlink_to(train / "cat")),
        "1 link to a folder above, or read already",
    ),
    "pipe": (lambda train: os.mkfifo(train / "cat" / "pipe.png"), "1 neither file nor folder"),
    "name that is no UTF-8, hidden": (lambda train: write_other_name(train, b".caf\xe9.png"), "1 hidden"),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_what_is_no_data_is_left_out_and_said(name: str, pets: DomainConfig) -> None:
    add, said = ODDITIES[name]
    add(Path(pets.root) / "train")
    train, _, notes = load(pets)
    assert train.classes == ("cat", "dog")
    assert train.images[:, 0, 0, 0].tolist() == REDS
    assert any(text.startswith("left out: ") and said in text for text in notes.texts())


def test_a_folder_behind_two_links_is_read_once(pets: DomainConfig, tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere" / "more.png", (99, 50, 100))
    for name in ("a", "b"):
        (tmp_path / "train" / "dog" / name).symlink_to(tmp_path / "elsewhere")
    train, _, notes = load(pets)
    assert train.images[:, 0, 0, 0].tolist().count(99) == 1
    assert notes.left_out == {"link to a folder above, or read already": 1}


def test_order_is_that_of_torchvision(tmp_path: Path) -> None:
    names = [
        "a/10.png",
        "a/9.png",
        "a/sub/0.png",
        "a/Z.png",
        "a/sub-2/5.png",
        "B/é.png",
        "B/e.png",
        "10/x.png",
        "9/x.png",
    ]
    for number, name in enumerate(names):
        save_image(tmp_path / "train" / name, (number, 0, 0))
    shutil.copytree(tmp_path / "train", tmp_path / "test")
    train = load(DomainConfig(name="x", source="imagefolder", root=str(tmp_path))).train
    theirs = ImageFolder(tmp_path / "train")
    assert list(train.classes) == theirs.classes
    assert train.labels.tolist() == theirs.targets
    assert train.images[:, 0, 0, 0].tolist() == [
        names.index(str(Path(p).relative_to(theirs.root))) for p, _ in theirs.samples
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1", "10", "2"], "ImageFolder: 0, 1, 10, 2; by number it would be 0, 1, 2, 10"),
        (["class9", "class10"], "ImageFolder: class10, class9; by number it would be class9, class10"),
        (["-1", "-2"], "ImageFolder: -1, -2; by number it would be -2, -1"),
        (["-1", "0"], None),
        (["01", "02", "10"], None),
        (["b", "a10"], None),
    ],
)
def test_numbers_in_another_order_than_their_own_are_told(names: list[str], said: str | None, tmp_path: Path) -> None:
    for side in ("train", "test"):
        for number, name in enumerate(names):
            save_image(tmp_path / side / name / "0.png", (number, 0, 0))
    config = DomainConfig(name="x", source="imagefolder", root=str(tmp_path))
    loaded = load(config)
    assert list(loaded.train.classes) == sorted(names)
    assert [text for text in loaded.notes.texts() if "order" in text] == [
        f"classes in the order of their characters, as torchvision's {said}" for _ in [said] if said
    ]
    assert load(replace(config, classes=sorted(names))).notes.texts() == []


@pytest.mark.parametrize("suffix", [".jfif", ".JPG", ".avif", ".webp", ".tif", ".ppm"])
def test_what_pillow_reads_is_read(suffix: str, pets: DomainConfig, tmp_path: Path) -> None:
    path = tmp_path / "train" / "cat" / f"9{suffix}"
    path.parent.mkdir(exist_ok=True)
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    image.save(path, "JPEG" if suffix == ".jfif" else None)
    red, green, blue = load(pets).train.images[4, :, 0, 0].tolist()
    assert (abs(red - 200) < 8, abs(green - 100) < 8, abs(blue - 50) < 8) == (True, True, True)


@pytest.mark.parametrize("sides", [("train", "test"), ("train",), ("test",)])
def test_images_beside_no_class_folders_are_of_one_class(sides: tuple[str, ...], tmp_path: Path) -> None:
    config = DomainConfig(name="mine", source="imagefolder", root=str(tmp_path))
    for side in ("train", "test"):
        (tmp_path / side).mkdir()
        for number in range(3 if side in sides else 0):
            Image.new("RGB", (8, 8), (number, 50, 100)).save(tmp_path / side / f"{number}.png")
    if len(sides) == 1:
        assert "there is " in refused(config)
        return
    loaded = load(config)
    assert loaded.train.classes == ("image",)
    assert loaded.train.images[:, 0, 0, 0].tolist() == loaded.test.images[:, 0, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "name", [b"caf\xe9", b"two\nlines", b"bell\x07"], ids=["Latin-1", "line break", "control character"]
)
def test_a_name_that_cannot_be_written_is_refused(name: bytes, pets: DomainConfig) -> None:
    train = os.fsencode(pets.root) + b"/train"
    os.rename(train + b"/cat", train + b"/" + name)  # noqa: PTH104 - a name of bytes
    message = refused(pets)
    assert message.startswith(f"domain.original.root: the name {pets.root}/train/")
    assert message.endswith("is not UTF-8 or has control characters; rename it")
    os.rename(train + b"/" + name, train + b"/cat")  # noqa: PTH104
    write_other_name(Path(pets.root) / "train", name + b".png")
    assert "rename it" in refused(pets)


def test_an_accent_is_the_same_in_either_spelling(tmp_path: Path, pets: DomainConfig) -> None:
    (tmp_path / "train" / "cat").rename(tmp_path / "train" / "cafe\u0301")
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "caf\u00e9")
    assert load(pets).train.classes == ("caf\u00e9", "dog")
    copies_of = tmp_path / "train" / "dog"
    shutil.copytree(copies_of, tmp_path / "train" / "caf\u00e9")
    assert "in two spellings; rename one" in refused(pets)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_other_names_of_the_test_folder(pets: DomainConfig, name: str) -> None:
    (Path(pets.root) / "test").rename(Path(pets.root) / name)
    assert len(load(pets).test) == 4


def test_only_what_is_kept_is_decoded(pets: DomainConfig) -> None:
    for path in Path(pets.root).glob("*/dog/*.png"):
        path.write_bytes(b"damaged")
    assert len(load(replace(pets, classes=["cat"], per_class=2)).train) == 2


@pytest.mark.parametrize(("side", "other"), [("train", "test"), ("test", "train")])
def test_a_class_without_images_matters_only_where_it_is_kept(side: str, other: str, pets: DomainConfig) -> None:
    root = Path(pets.root)
    (root / side / "eel").mkdir()
    save_image(root / other / "eel" / "0.png", (0, 0, 0))
    assert refused(pets) == f"domain.original.classes: there is no {side} image of 'eel'; name other classes"
    (root / side / "eel").rmdir()
    assert refused(pets).startswith(f"domain.original.classes: there is no {side} image of 'eel'")
    assert load(replace(pets, classes=["dog", "cat"])).train.classes == ("dog", "cat")


def test_missing_folders(pets: DomainConfig, tmp_path: Path) -> None:
    assert f"domain.original.root: there is no folder {tmp_path}/no; give" in refused(
        replace(pets, root=str(tmp_path / "no"))
    )
    assert "cannot read" in refused(replace(pets, root="x" * 300))
    assert "~nobody-of-that-name" in refused(replace(pets, root="~nobody-of-that-name/data"))
    (tmp_path / "test").rename(tmp_path / "exam")
    assert "there is no folder test (nor val, nor valid) in " in refused(pets)
    assert "there is no folder train in " in refused(replace(pets, root=str(tmp_path / "train")))
    assert "domain.original.dataset: 'cifar10' is not allowed; leave it empty" in refused(
        replace(pets, dataset="cifar10")
    )


def test_the_line_that_is_said_of_a_domain(pets: DomainConfig, tmp_path: Path) -> None:
    for side, count in (("train", 20), ("test", 3)):
        for number in range(count):
            save_image(tmp_path / side / "cat" / f"{number}.png", (number, 1, 40 * (side == "test")), (16, 8))
            save_image(tmp_path / side / "dog" / f"{number}.png", (number, 2, 40 * (side == "test")))
    shutil.copy(tmp_path / "train" / "dog" / "3.png", tmp_path / "train" / "dog" / "copy.png")
    (tmp_path / "train" / "dog" / "notes.txt").touch()
    assert str(load_restricted(pets, image_size=8, channels=3)) == (
        "domain pets: 2 classes (cat, dog); images: adapt 16, query 4, attack 16, select 4, test 6; "
        "left out: 1 .txt, 1 repeated; 23 of 47 resized to 8x8, the aspect ratio of 23 changed"
    )
