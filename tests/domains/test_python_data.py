"""Data at hand in Python, and lists of labels beside images: what is understood, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sophon.config import DomainConfig
from sophon.domains import Domain, load_original
from sophon.domains.python_data import as_image
from sophon.errors import UserError
from tests.domains.made import (
    COUNTS,
    SIDE,
    Pairs,
    Table,
    loaded,
    of,
    pictures,
    pixels,
    write_csv,
    write_listed,
    write_one_list,
)

# ---- refusals -------------------------------------------------------------------------------------------------------


def spoilt(value: object) -> Callable[[Path], DomainConfig]:
    return of(lambda side: ([*pictures(side)[:-1], value], pixels(side)[1]))


def relabelled(*labels: object) -> Callable[[Path], DomainConfig]:
    return of(lambda side: (pictures(side), [*pixels(side)[1].tolist()[: -len(labels)], *labels]))


class Changing(Pairs):
    """A Dataset with augmentation."""

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return np.random.default_rng().integers(0, 256, (8, 8), dtype=np.uint8), 0


class Lying(Pairs):
    """A Dataset whose targets are not its labels."""

    targets = (1,) * COUNTS["train"]


def listed(text: str, name: str = "metadata.csv") -> Callable[[Path], DomainConfig]:
    def write(root: Path) -> DomainConfig:
        config = write_listed(root, write_csv)
        (root / "train" / "metadata.csv").unlink()
        (root / "train" / name).write_text(text)
        return config

    return write


def one_list(rows: str) -> Callable[[Path], DomainConfig]:
    def write(root: Path) -> DomainConfig:
        (root / "metadata.csv").write_text(f"file_name,label,split\n{rows}")
        return DomainConfig(name="x", source="imagefolder", root=str(root))

    return write


REFUSED: dict[str, tuple[Callable[[Path], DomainConfig], str]] = {
    "a number": (lambda root: Domain(7), "data: a int is not allowed; give a folder, a torch Dataset"),
    "an iterator": (lambda root: Domain(iter([])), "data: a list_iterator is not allowed"),
    "a mapping without train": (lambda root: Domain({"test": []}), "of a mapping of data sets 'train' and 'test' are"),
    "folder and test": (lambda root: Domain(str(root), pixels("test")), "a folder holds its own test images"),
    "fraction": (lambda root: Domain([], test_fraction=1.0), "test_fraction=1.0 is not allowed"),
    "numbers of both": (of(lambda side: (pictures(side), [0])), "24 images do not match 1 labels"),
    "four arrays": (lambda root: Domain((*pixels("train"), *pixels("test")), name="x"), "give sophon.Domain((images, "),
    "no pairs": (of(lambda side: pictures(side)), "item 0 is no pair (image, label)"),
    "other columns": (of(lambda side: Table(picture=[], label=[])), "columns picture, label are not allowed"),
    "augmentation": (of(lambda side: Changing(*pixels(side))), "image 0 is another one each time"),
    "targets": (of(lambda side: Lying(*pixels(side))), "item 0 has the label 0 and the target 1"),
    "normalised": (spoilt(np.full((8, 8), -0.5)), "it: image 23 of x cannot be read: its values are not in 0..1"),
    "not a number": (spoilt(np.full((8, 8), np.nan)), "its values are not in 0..1"),
    "bytes as floats": (spoilt(torch.full((3, 8, 8), 255.0)), "its values are not in 0..1"),
    "whole numbers": (spoilt(np.zeros((8, 8), np.int64)), "its values are int64; give uint8"),
    "five channels": (spoilt(np.zeros((8, 8, 5), np.uint8)), "its shape is [8, 8, 5]"),
    "two images": (spoilt(np.zeros((2, 8, 8, 3), np.uint8)), "its shape is [2, 8, 8, 3]"),
    "no image": (spoilt(None), "a NoneType is no image"),
    "no such file": (spoilt("no/such.png"), "the image no/such.png cannot be read"),
    "16 bits": (spoilt(Image.fromarray(np.zeros((8, 8), np.uint16))), "its pixels have mode I;16"),
    "truth as label": (relabelled(True), "a label of type bool is not allowed"),
    "fraction as label": (relabelled(0.5), "a label of type float is not allowed"),
    "one-hot labels": (of(lambda side: (pictures(side), np.eye(2)[pixels(side)[1]])), "a label of type ndarray"),
    "both kinds of labels": (relabelled("dog"), "some labels are numbers and some are names"),
    "unlabelled": (
        of(lambda side: Table(["a", "b"], image=pictures(side), label=[-1] * 24)),
        "the label -1 is none of the 2",
    ),
    "label without a name": (
        of(lambda side: (pictures(side), pixels(side)[1]), class_names=["zero"]),
        "the label 1 is none of the 1 classes zero",
    ),
    "unwritable class": (
        of(lambda side: (pictures(side), pixels(side)[1]), class_names=["zero", "a\nb"]),
        "the class name a\\nb is not UTF-8 or has control characters",
    ),
    "list without labels": (listed("file_name\nall/00.png\n"), "give these two columns (it has file_name)"),
    "list with semicolons": (
        listed("file_name;label\nall/00.png;1\n"),
        "give these two columns (it has file_name;label)",
    ),
    "list of nothing": (listed("file_name,label\n"), "metadata.csv lists no image"),
    "list with two columns of a name": (listed("file_name,label,label\nx,1,2\n"), "two columns have the same name"),
    "list with two labels of an image": (listed("file_name,label\na,1\na,1\na,0\n"), "row 3 of "),
    "list of other images": (listed("file_name,label\n../../x.png,1\n"), "names an image outside of the folder"),
    "list of absent images": (listed("file_name,label\nall/99.png,1\nall/00.png,0\n"), "99.png cannot be read"),
    "no JSON": (listed("{'file_name'", "metadata.jsonl"), "metadata.jsonl cannot be read: "),
    "JSON of something else": (listed("[1, 2]", "metadata.jsonl"), "row 1 of "),
    "JSON that is nested without end": (listed("[" * 100_000, "metadata.jsonl"), "metadata.jsonl cannot be read: "),
    "label of many digits": (listed(f"file_name,label\nall/00.png,{'9' * 5000}\n"), "some labels are numbers and some"),
    "one list without splits": (one_list("a,0\nb,1\n"), "tell them by a column split"),
    "one list without test images": (one_list("a,0,train\nb,1,train\n"), "tell them by a column split"),
    "row without a label": (listed("file_name,label\nx,"), "row 1 of "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, said = REFUSED[name]
    with pytest.raises(UserError) as caught:
        loaded(make(tmp_path))
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_list_on_one_side_only_is_refused(tmp_path: Path) -> None:
    config = write_listed(tmp_path, write_csv)
    (tmp_path / "test" / "metadata.csv").unlink()
    with pytest.raises(UserError, match=r"test has no metadata\.csv or metadata\.jsonl, which the other side has$"):
        loaded(config)


# ---- what Python's data may be besides ------------------------------------------------------------------------------


def test_images_without_a_row_are_left_out_and_said(tmp_path: Path) -> None:
    config = write_listed(tmp_path, write_csv)
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "train" / "all" / "more.png")
    assert "left out: 1 without a row in metadata.csv" in loaded(config).notes


def test_images_of_another_split_are_left_out_and_said(tmp_path: Path) -> None:
    config = write_one_list(tmp_path, write_csv)
    with (tmp_path / "metadata.csv").open("a") as file:
        file.write("images/train00.png,0,val\n")
    assert "left out: 1 of another split" in loaded(config).notes


def test_without_test_images_a_part_of_each_class_is_set_aside() -> None:
    images, labels = pixels("train")
    domain = loaded(Domain((images, labels), name="x", test_fraction=0.25), load=load_original)
    assert torch.bincount(domain["test"].labels).tolist() == [3, 3]
    assert sum(map(len, domain.splits.values())) == len(images)
    assert len({bytes(row) for split in domain.splits.values() for row in split.fingerprints().numpy()}) == len(images)
    only = loaded(Domain({"train": (images, labels)}, name="x", test_fraction=0.25), load=load_original)
    assert dict(only.hashes) == dict(domain.hashes)
    other = loaded(Domain((images, labels), name="x", test_fraction=0.25, split_seed=1), load=load_original)
    assert other.hashes["test"] != domain.hashes["test"]


def test_numbers_as_labels_are_in_their_own_order() -> None:
    images = np.random.default_rng(0).integers(0, 256, (48, 8, 8), dtype=np.uint8)
    labels = [2, 10, 1, 9] * 12
    assert loaded(Domain((images, labels))).classes == ("1", "2", "9", "10")
    assert loaded(Domain((images, list(map(str, labels))))).classes == ("1", "10", "2", "9")
    assert loaded(Domain((images, labels), class_names=list("abcdefghijk"), classes=["k", "b"])).classes == ("k", "b")


@pytest.mark.parametrize(
    ("image", "expected_pixel"),
    [
        (torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1).expand(3, 4, 4), [255, 128, 0]),
        (np.array([255, 128, 0], np.uint8) * np.ones((4, 4, 1), np.uint8), [255, 128, 0]),
        (np.array([1.0, 0.5, 0.0], np.float32) * np.ones((4, 4, 1), np.float32), [255, 128, 0]),
        (np.array([9, 9, 9, 0], np.uint8) * np.ones((4, 4, 1), np.uint8), [255, 255, 255]),
        (torch.arange(3, dtype=torch.uint8).view(3, 1, 1).expand(3, 3, 3), [0, 1, 2]),
        (np.arange(3, dtype=np.uint8) * np.ones((3, 3, 1), np.uint8), [0, 1, 2]),
        (torch.full((4, 4), 0.2, dtype=torch.float16), [51, 51, 51]),
    ],
)
def test_forms_of_an_image(image: Any, expected_pixel: list[int]) -> None:
    assert list(as_image(image).convert("RGB").getpixel((1, 1))) == expected_pixel  # type: ignore[arg-type]


def test_a_domain_is_a_configuration_that_can_be_sent_to_another_process() -> None:
    domain = Domain(pixels("train"), pixels("test"), name="x", per_class=8)
    assert asdict(domain) == asdict(DomainConfig(name="x", source="python", root="memory", per_class=8))
    assert dict(loaded(ForkingPickler.loads(ForkingPickler.dumps(domain))).hashes) == dict(loaded(domain).hashes)
