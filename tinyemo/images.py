"""Encoded images to pixels. H, W are the side of the result in pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyemo.errors import DataError


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """The image's centre square as (size, size, 3) uint8 RGB: short side scaled to `size` (bicubic), rest cut off.

    A JPEG that is much larger is scaled down while it is decoded, which is several times faster.

    Raises:
        DataError: these bytes are no whole image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (size, size))
            pixels = image.convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"these {len(data)} bytes are no whole image ({error}): ingest the data set again") from error
    scale = size / min(pixels.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (pixels.width - size) // 2, (pixels.height - size) // 2
    if pixels.size != (size, size):
        pixels = pixels.crop((left, top, left + size, top + size))
    return np.asarray(pixels)
