"""What every source of images must do: the same images give the same domain, wherever they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from sophon.config import DomainConfig
from sophon.domains import Domain, LoadedDomain, bundled
from tests.domains.made import (
    COUNTS,
    Pairs,
    Table,
    floats,
    loaded,
    of,
    pictures,
    pixels,
    write_bundled,
    write_csv,
    write_folder,
    write_jsonl,
    write_listed,
    write_mnist,
    write_one_list,
)

SOURCES: dict[str, Callable[[Path], DomainConfig]] = {
    "image folder": write_folder,
    "image folder in Python": lambda root: Domain(write_folder(root).root, name="x"),
    "metadata.csv": lambda root: write_listed(root, write_csv),
    "metadata.jsonl": lambda root: write_listed(root, write_jsonl),
    "metadata.csv of both sides": lambda root: write_one_list(root, write_csv),
    "torchvision": write_mnist,
    "bundled": write_bundled,
    "arrays": of(pixels),
    "arrays, channels last": of(lambda side: (pixels(side)[0][..., None], pixels(side)[1].tolist())),
    "tensors": of(lambda side: (floats(side), torch.from_numpy(pixels(side)[1]))),
    "bytes as tensors": of(lambda side: (torch.from_numpy(pixels(side)[0])[:, None], pixels(side)[1])),
    "names as labels": of(lambda side: (pictures(side), [str(label) for label in pixels(side)[1]])),
    "torch Dataset": of(lambda side: Pairs(pictures(side), pixels(side)[1])),
    "TensorDataset": of(lambda side: TensorDataset(floats(side), torch.from_numpy(pixels(side)[1]))),
    "list of pairs": of(lambda side: list(zip(pictures(side), pixels(side)[1].tolist(), strict=True))),
    "Hugging Face": of(lambda side: Table(image=pictures(side), label=pixels(side)[1].tolist())),
    "Hugging Face, named": of(lambda side: Table(["0", "1"], images=pictures(side), labels=pixels(side)[1].tolist())),
    "Hugging Face, of both": lambda root: Domain(
        {side: Table(image=pictures(side), label=pixels(side)[1].tolist()) for side in COUNTS}, name="x"
    ),
    "paths": lambda root: Domain(
        *(
            ([str(path) for path in sorted(Path(write_folder(root / side).root).glob(f"{side}/*/*"))], pixels(side)[1])
            for side in COUNTS
        ),
        name="x",
    ),
}
MEMORY = {"in memory": 1.0, "streamed": 0.0}


@pytest.fixture(autouse=True)
def bundled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the package's data lie in the test's folder, with any hash."""
    known = bundled.BUNDLED["mnist"]
    monkeypatch.setattr(bundled, "_DATA", tmp_path)

    class Hash:
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    monkeypatch.setitem(bundled.BUNDLED, "mnist", known._replace(sha256=Hash()))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def expected() -> LoadedDomain:
    return loaded(SOURCES["arrays"](Path()))


@pytest.mark.parametrize("memory_gb", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("name", SOURCES)
def test_the_same_images_are_the_same_domain(
    name: str, memory_gb: float, tmp_path: Path, expected: LoadedDomain
) -> None:
    domain = loaded(SOURCES[name](tmp_path), memory_gb)
    assert domain.classes == ("0", "1")
    assert dict(domain.hashes) == dict(expected.hashes)  # pixels, labels, order and splits
    assert domain.notes == expected.notes + domain.notes[len(expected.notes) :]


def test_the_expected_splits_are_the_images_that_were_made(expected: LoadedDomain) -> None:
    made = {image.tobytes(): label for side in COUNTS for image, label in zip(*pixels(side), strict=True)}
    seen = {}
    for images in expected.splits.values():
        batch = images.first(99)
        seen |= {image.numpy().tobytes(): label for image, label in zip(batch.images, batch.labels, strict=True)}
    assert {key: int(label) for key, label in seen.items()} == made
    assert sum(map(len, expected.splits.values())) == len(made)


@pytest.mark.parametrize("name", SOURCES)
def test_a_part_is_chosen_alike(name: str, tmp_path: Path) -> None:
    configs = [SOURCES[source](tmp_path) for source in (name, "arrays")]
    for config in configs:
        config.classes, config.per_class = ["1"], 6
    first, second = map(loaded, configs)
    assert first.classes == ("1",)
    assert dict(first.hashes) == dict(second.hashes)
