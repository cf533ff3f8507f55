"""Image files as pixels: every mode, orientation and kind of damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from sophon.config import DomainConfig
from sophon.domains.decoding import eight_bit, open_image
from sophon.domains.part import UnreadableError
from tests.domains.made import load, refused, save_image, write_pets


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def pets(tmp_path: Path) -> DomainConfig:
    return write_pets(tmp_path)


def test_images_are_turned_as_their_camera_was(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(noise(6, 4, 3)).save(tmp_path / "x.png", exif=exif)
        with Image.open(tmp_path / "x.png") as image:
            assert np.array_equal(open_image(str(tmp_path / "x.png")), ImageOps.exif_transpose(image))


@pytest.mark.parametrize("block", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\x7f", b""])
def test_damaged_metadata_of_a_whole_image(block: bytes, tmp_path: Path) -> None:
    Image.fromarray(noise(6, 4, 3)).save(tmp_path / "x.png", exif=block)
    assert open_image(str(tmp_path / "x.png")).size == (4, 6)


RED = (255, 0, 0)
PALETTE = Image.new("P", (2, 1))
PALETTE.putpalette([255, 0, 0, 0, 0, 255])
PALETTE.putdata([0, 1])


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("RGBA", (2, 1), (*RED, 255)), {}, [RED, RED]),
        (Image.new("RGBA", (2, 1), (*RED, 0)), {}, [(255,) * 3] * 2),
        (Image.new("RGBA", (2, 1), (*RED, 51)), {}, [(255, 204, 204)] * 2),
        (Image.new("LA", (2, 1), (0, 0)), {}, [255, 255]),
        (Image.new("LA", (2, 1), (80, 255)), {}, [80, 80]),
        (Image.new("1", (2, 1), 1), {}, [255, 255]),
        (PALETTE, {}, [RED, (0, 0, 255)]),
        (PALETTE, {"transparency": 1}, [RED, (255,) * 3]),
        (PALETTE, {"transparency": b"\x00\xff"}, [(255,) * 3, (0, 0, 255)]),
        (Image.new("RGB", (2, 1), RED), {"transparency": RED}, [(255,) * 3] * 2),
        (Image.new("L", (2, 1), 7), {"transparency": 7}, [255, 255]),
    ],
)
def test_what_is_transparent_is_white(
    image: Image.Image, options: dict[str, object], expected: list[object], tmp_path: Path
) -> None:
    image.save(tmp_path / "x.png", **options)  # type: ignore[arg-type]
    read = open_image(str(tmp_path / "x.png"))
    assert read.mode == ("L" if isinstance(expected[0], int) else "RGB")
    assert list(read.get_flattened_data()) == expected


def test_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (250, 0)]
    for suffix in ("gif", "webp", "tif", "png"):
        frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
        assert open_image(str(tmp_path / f"x.{suffix}")).getpixel((0, 0))[0] > 240  # type: ignore[index]


@pytest.mark.parametrize(
    ("image", "name", "mode"),
    [
        (Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "x.png", "I;16"),
        (Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "x.tif", "I;16"),
        (Image.fromarray(np.full((8, 8), 70_000, np.int32)), "x.tif", "I"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "x.tif", "F"),
    ],
)
def test_more_than_8_bits_are_refused(
    image: Image.Image, name: str, mode: str, tmp_path: Path, pets: DomainConfig
) -> None:
    image.save(tmp_path / "train" / "cat" / name)
    assert f"cannot be read: its pixels have mode {mode}, not 8 bits; convert it to 8 bits first" in refused(pets)


def damaged(kind: str, path: Path) -> None:
    Image.fromarray(noise(40, 40, 3)).save(path)
    whole = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "text": b"version https://git-lfs.github.com/spec/v1\n",
            "truncated": whole[: len(whole) // 2],
            "broken chunk": whole.replace(b"IDAT", b"IDAT"[::-1]),
            "broken bytes": whole[:100] + bytes(100) + whole[200:],
            "other image's suffix": b"GIF89a",
        }.get(kind, whole)
    )
    if kind == "broken link":
        path.unlink()
        path.symlink_to("nowhere.png")


@pytest.mark.parametrize(
    "kind", ["empty", "text", "truncated", "broken chunk", "broken bytes", "other image's suffix", "broken link"]
)
def test_an_unreadable_image_is_named_or_left_out(pets: DomainConfig, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "train" / "dog" / "2.png"
    path.unlink()
    damaged(kind, path)
    message = refused(pets)
    assert message.startswith(f"domain.original.root: the image {path} cannot be read: ")
    assert message.endswith("; domain.original.skip_unreadable=true leaves such out")
    train, _, notes = load(replace(pets, skip_unreadable=True))
    assert train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 10, 11, 13]
    assert f"left out: 1 unreadable (first: the image {path} cannot be read: " in notes.texts()[0]


@given(
    st.binary(max_size=200), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"II*\x00", b"\xff\xd8\xff"])
)
def test_any_bytes_are_an_image_or_unreadable(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.png"
    path.write_bytes(head + data)
    try:
        assert open_image(str(path)).mode in ("L", "RGB")
    except UnreadableError as error:
        assert str(error).isprintable()  # noqa: PT017


def test_sizes_may_differ(pets: DomainConfig, tmp_path: Path) -> None:
    save_image(tmp_path / "train" / "cat" / "4.jpg", (200, 200, 200), (31, 5))
    save_image(tmp_path / "train" / "cat" / "5.png", 77, (3, 3), "L")
    images = load(pets).train.images
    assert images.shape == (10, 3, 8, 8)
    assert images[5].unique().tolist() == [77]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV", "PA", "RGBX"])
def test_other_colour_spaces_become_rgb(mode: str) -> None:
    assert eight_bit(Image.new(mode, (2, 2))).mode == "RGB"


def test_a_class_of_unreadable_images_is_refused(pets: DomainConfig, tmp_path: Path) -> None:
    for path in (tmp_path / "test" / "dog").iterdir():
        path.write_bytes(b"")
    assert "there is no test image of 'dog'" in refused(replace(pets, skip_unreadable=True))
