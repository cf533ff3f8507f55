"""Image files and Pillow images as 8-bit pixels of a model's size.

Pillow does every conversion and resize: its arithmetic on 8-bit images is integer, so the pixels, and with them the
hashes of the splits, are the same on every machine.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from sophon.domains.names import escaped
from sophon.domains.part import UnreadableError
from sophon.errors import one_line

MODES = {1: "L", 3: "RGB"}

Image.init()
# Formats that Pillow recognises but cannot decode, or only with a program from outside.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SUFFIXES = frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in {*Image.OPEN, "MPO"} - _NOT_DECODED)


def open_image(path: str) -> Image.Image:
    """Read an image file: its first frame, upright as its EXIF orientation says, in 8 bits.

    Returns:
        An image of mode L or RGB; see `eight_bit`.

    Raises:
        UnreadableError: whatever Pillow's decoders raise, which for damaged files is almost anything.
    """
    try:
        with Image.open(path) as image:
            image.load()  # raises what damaged pixels lead to
            with suppress(Exception):  # damaged metadata of an image that is whole
                ImageOps.exif_transpose(image, in_place=True)
            return eight_bit(image)
    except Exception as error:
        raise UnreadableError(f"the image {escaped(path)} cannot be read: {one_line(error)}") from error


def eight_bit(image: Image.Image) -> Image.Image:
    """Convert an image to mode L or RGB, what is transparent on white.

    Raises:
        ValueError: its pixels have more than 8 bits (a conversion would clip them) or no conversion to RGB.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"its pixels have mode {image.mode}, not 8 bits; convert it to 8 bits first")
    mode = "L" if image.mode in ("1", "L", "LA", "La") else "RGB"
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def to_tensor(image: Image.Image, shape: tuple[int, int, int]) -> Tensor:
    """Convert an image to uint8 [C, H, W] of ``shape``: grey or RGB, stretched (bilinear, antialiased)."""
    channels, height, width = shape
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image).reshape(height, width, channels)).permute(2, 0, 1)
