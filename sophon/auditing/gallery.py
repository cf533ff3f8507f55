"""Pictures of what models generate: grids as PNG files beside an audit's attempts."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor

from sophon.files import write_bytes

_LEAST = 256  # pixels of a grid's longer side: small images are enlarged by a whole factor


def image_grid(images: Tensor) -> bytes:
    """Return a PNG of uint8 images [N, C, H, W], C 1 or 3, N >= 1, in a grid as square as can be.

    Small images are enlarged without smoothing.
    """
    from torchvision.utils import make_grid  # takes seconds, and only what generates comes here

    grid = (
        make_grid(images.cpu(), nrow=math.ceil(math.sqrt(len(images))), padding=1, pad_value=255)
        .permute(1, 2, 0)
        .numpy()
    )
    picture = Image.fromarray(grid)
    factor = max(1, math.ceil(_LEAST / max(picture.size)))
    buffer = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def write_gallery(folder: Path, images: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Write one grid for each set of images to ``samples/`` in ``folder``, atomically.

    Args:
        images: uint8 [N, C, H, W] by title; titles differ in their letters and digits.

    Returns:
        ``title`` and ``file`` (relative to ``folder``) of each, in the order given: the summary's ``gallery``.

    Raises:
        UserError: a file cannot be written.
    """
    gallery: list[dict[str, str]] = []
    for title, pictures in images.items():
        file = f"samples/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}.png"
        write_bytes(folder / file, image_grid(pictures))
        gallery.append({"title": title, "file": file})
    return gallery
