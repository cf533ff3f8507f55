"""Image files for tests, and what loading them gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sophon.config import DomainConfig
from sophon.domains import load_source
from sophon.domains.sources import Loaded
from sophon.errors import UserError


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
