import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sophon.auditing.gallery import image_grid, write_gallery
from sophon.errors import UserError


def pictures(count=4, channels=1, size=8, value=200):
    return torch.full((count, channels, size, size), value, dtype=torch.uint8)


def opened(data):
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


# ---- grids ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 10), st.sampled_from([1, 3]), st.integers(1, 40))
def test_grid_is_a_whole_picture_of_a_readable_size(count, channels, size):
    image = opened(image_grid(pictures(count, channels, size)))
    assert image.format == "PNG"
    assert max(image.size) >= 256
    wide = math.ceil(math.sqrt(count))
    assert image.width % (wide * (size + 1) + 1 if count > 1 else size) == 0


def test_grid_keeps_pixels_as_they_are():
    image = opened(image_grid(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1) * 60))
    factor = image.width // 5
    seen = [image.getpixel((x * factor, y * factor))[0] for y in (1, 3) for x in (1, 3)]
    assert seen == [0, 60, 120, 180]
    assert image.getpixel((0, 0)) == (255, 255, 255)


# ---- the gallery ----------------------------------------------------------------------------------------------------


def test_gallery_writes_a_file_for_each_title(tmp_path):
    titles = {"Real images of Fashion MNIST": pictures(), "released": pictures(9, 3, 16)}
    gallery = write_gallery(tmp_path, titles)
    assert gallery == [
        {"title": "Real images of Fashion MNIST", "file": "samples/real-images-of-fashion-mnist.png"},
        {"title": "released", "file": "samples/released.png"},
    ]
    assert [opened((tmp_path / entry["file"]).read_bytes()).format for entry in gallery] == ["PNG", "PNG"]
    assert len(list((tmp_path / "samples").iterdir())) == 2
    assert write_gallery(tmp_path, titles) == gallery
    assert write_gallery(tmp_path, {}) == []


def test_gallery_in_an_unwritable_folder(tmp_path):
    (tmp_path / "samples").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot write"):
        write_gallery(tmp_path, {"real": pictures()})
