"""Image files and Pillow images as 8-bit pixels of a model's size.

Pillow does every conversion and resize: its arithmetic on 8-bit images is integer, so the pixels, and with them the
hashes of the splits, are the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from sophon.domains.names import escaped
from sophon.domains.part import UnreadableError

MODES = {1: "L", 3: "RGB"}

Image.init()
# Formats that Pillow recognises but cannot decode, or only with a program from outside.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
SUFFIXES = frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in {*Image.OPEN, "MPO"} - _NOT_DECODED)
_TRANSPOSED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str) -> Image.Image:
    """Read an image file: its first frame, upright as its EXIF orientation says, in 8 bits.

    Returns:
        An image of mode L or RGB; see `eight_bit`.

    Raises:
        UnreadableError: whatever Pillow's decoders raise, which for damaged files is almost anything.
    """
    try:
        with Image.open(path) as image:
            return _upright(eight_bit(image), _orientation(image))
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


def one_line(error: BaseException) -> str:
    """Return an exception's message on one line; its type if it has none."""
    return escaped(" ".join(str(error).split()) or type(error).__name__)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata of an image that is whole
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TRANSPOSED[orientation]) if orientation in _TRANSPOSED else image
