"""Image folders: ``root/train/CLASS/IMAGE`` and ``root/test/CLASS/IMAGE``, or a list of the images."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sophon.config import DomainConfig
from sophon.domains.decoding import SUFFIXES, open_image
from sophon.domains.labels import Side, labelled
from sophon.domains.metadata import METADATA_FILES, read_metadata
from sophon.domains.names import escaped, few, is_writable
from sophon.domains.part import Part, data_root
from sophon.errors import UserError
from sophon.paths import entries, exists, explained, is_file, is_folder, require_folder

# What archives, file servers and desktops leave in folders; names with a dot in front are hidden anyway.
_JUNK = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__"}
_TEST_FOLDERS = ("test", "val", "valid")
_LINK = "link to a folder above, or read already"


def image_folder(config: DomainConfig, where: str) -> tuple[Part, Part]:
    """Open an image folder.

    The classes are the folders of ``train`` and of ``test`` (else ``val``, ``valid``), in the order of torchvision's
    ImageFolder; a class's images are the files at any depth below it whose suffix Pillow reads. Where both sides have a
    ``metadata.csv`` or ``metadata.jsonl``, as in Hugging Face's imagefolder, it says what the images and labels are.
    Without a folder ``train`` it may lie in the root, with a column ``split`` besides. Where ``train`` has images and
    no class folders all are of one class, ``image``. Hidden files and folders are no data, and a folder that links lead
    to again is read once.

    Raises:
        UserError: a folder is missing or may not be listed, or a name in it cannot be written as UTF-8.
    """
    key = f"{where}.root"
    if config.dataset:
        raise UserError(f"{where}.dataset: '{config.dataset}' is not allowed; leave it empty for an image folder")
    root = data_root(config, where)
    require_folder(root, key)
    if not is_folder(root / "train", key) and any(is_file(root / name, key) for name in METADATA_FILES):
        return _Side(root, key).split()
    tests = [root / name for name in _TEST_FOLDERS if is_folder(root / name, key)]
    if not is_folder(root / "train", key) or not tests:
        missing = "test (nor val, nor valid)" if is_folder(root / "train", key) else "train"
        folders = [path.name for path in entries(root, key) if is_folder(path, key)]
        only = f", only {escaped(few(folders))}" if folders else ""
        raise UserError(
            f"{key}: there is no folder {missing} in {root}{only}; give root/train/CLASS/IMAGE and "
            f"root/test/CLASS/IMAGE, or {METADATA_FILES[0]} in root with the columns file_name, label and split"
        )
    train, test = _Side(root / "train", key), _Side(tests[0], key)
    if train.metadata or test.metadata:
        train_part, test_part = labelled([train.listed()[0], test.listed()[0]], None, f"{key}: {root}")
        return train_part, test_part
    if train.has_images and not train.folders:
        return train.one_class(), test.one_class()
    classes = tuple(sorted({*train.folders, *test.folders}))
    if not classes:
        raise UserError(
            f"{key}: there is neither a class folder nor an image in {train.folder}; give root/train/CLASS/IMAGE, "
            f"root/train/IMAGE for images of one class, or {METADATA_FILES[0]} in root/train and in root/test"
        )
    kept = classes if config.classes is None else config.classes
    return train.part(classes, kept), test.part(classes, kept)


class _Side:
    """One side of an image folder, ``train`` or ``test``.

    Attributes:
        folders: the class folders' paths by their names.
        left_out: what is no data, by the reason.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self._key = folder, key
        self.left_out: Counter[str] = Counter()
        with explained(folder, "read", key):
            listed = self._entries(str(folder))
            folders = [entry for entry in listed if entry.is_dir()]
        self._files = [entry.name for entry in listed if entry not in folders]
        self.folders: dict[str, str] = {}
        for entry in folders:
            name = unicodedata.normalize("NFC", entry.name)  # some systems write accents as characters of their own
            if os.path.realpath(entry.path) in _above(entry.path):
                self._skip(_LINK)
            elif name in self.folders:
                raise UserError(f"{key}: two class folders of {folder} are named {name}, in two spellings; rename one")
            else:
                self.folders[name] = entry.path

    def part(self, classes: tuple[str, ...], kept: Sequence[str]) -> Part:
        """Return the images of the classes that are kept, labelled by the position in ``classes``."""
        for name in self._files:
            self._skip("beside the class folders" if _suffix(name) in SUFFIXES else _suffix(name))
        paths: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            if name in kept and name in self.folders:
                paths += self._images(self.folders[name])
                labels += [label] * (len(paths) - len(labels))
        return Part(labels, classes, lambda index: open_image(paths[index]), self.left_out)

    @property
    def metadata(self) -> Path | None:
        """The file that lists the images and their labels, if there is one."""
        return next((self.folder / name for name in METADATA_FILES if name in self._files), None)

    def listed(self) -> tuple[Side, list[Any]]:
        """Return the images that a file lists, and what it says of their splits.

        Raises:
            UserError: there is no such file, or it is malformed.
        """
        if self.metadata is None:
            raise UserError(
                f"{self._key}: {self.folder} has no {' or '.join(METADATA_FILES)}, which the other side has"
            )
        paths, labels, texts, splits = read_metadata(self.metadata, self._key)
        unlisted = set(self._images(str(self.folder))) - set(paths)
        self._skip(f"without a row in {self.metadata.name}", len(unlisted))
        del self.left_out[self.metadata.suffix]
        return Side(labels, None, lambda index: open_image(paths[index]), self.left_out, texts), splits

    def split(self) -> tuple[Part, Part]:
        """Return the train and the test images of a file that lists both."""
        side, splits = self.listed()
        (both,) = labelled([side], None, f"{self._key}: {self.folder}")
        test = next((name for name in _TEST_FOLDERS if name in splits), None)
        if "train" not in splits or test is None:
            raise UserError(
                f"{self._key}: {self.metadata} must list train and test images; tell them by a column split"
            )
        self._skip("of another split", sum(split not in ("train", test) for split in splits))
        of_train, of_test = (torch.tensor([split == name for split in splits]) for name in ("train", test))
        return replace(both.take(of_train), left_out=self.left_out), both.take(of_test)

    @property
    def has_images(self) -> bool:
        """Whether there are images beside the class folders."""
        return any(_suffix(name) in SUFFIXES for name in self._files)

    def one_class(self) -> Part:
        """Return all images as one class."""
        paths = self._images(str(self.folder))
        if not paths:
            raise UserError(f"{self._key}: there is no image in {self.folder}")
        return Part([0] * len(paths), ("image",), lambda index: open_image(paths[index]), self.left_out)

    def _images(self, top: str) -> list[str]:
        """Return the image files below ``top`` in the order of torchvision's ImageFolder: by folder, then by name."""
        images: dict[str, list[str]] = {}
        read, pending = _above(top), [top]
        while pending:
            folder = pending.pop()
            if (real := os.path.realpath(folder)) in read:
                self._skip(_LINK)
                continue
            read.add(real)
            with explained(escaped(folder), "read", self._key):
                for entry in self._entries(folder):
                    if entry.is_dir():
                        pending.append(entry.path)
                    elif _suffix(entry.name) not in SUFFIXES:
                        self._skip(_suffix(entry.name))
                    elif entry.is_file() or not exists(entry.path):  # a broken link is an image that cannot be read
                        images.setdefault(folder, []).append(entry.path)
                    else:
                        self._skip("neither file nor folder")
        return [path for folder in sorted(images) for path in images[folder]]

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """List a folder by name, without what is no data."""
        with os.scandir(folder) as listed:
            everything = sorted(listed, key=lambda entry: entry.name)
        shown = [entry for entry in everything if not entry.name.startswith(".") and entry.name not in _JUNK]
        self._skip("hidden", len(everything) - len(shown))
        for entry in shown:
            if not is_writable(entry.name):
                raise UserError(
                    f"{self._key}: the name {escaped(entry.path)} is not UTF-8 or has control characters; rename it"
                )
        return shown

    def _skip(self, reason: str, count: int = 1) -> None:
        if count:
            self.left_out[reason] += count


def _suffix(name: str) -> str:
    _, dot, suffix = name.rpartition(".")
    return f".{suffix.lower()}" if dot else "without a suffix"


def _above(folder: str) -> set[str]:
    """Return the real paths of the folders above, by the way that the path takes and by where it really lies."""
    lexical, real = Path(folder).absolute(), Path(os.path.realpath(folder))
    return {os.path.realpath(parent) for parent in lexical.parents} | {str(parent) for parent in real.parents}
