"""Encoded images to pixels. H, W are the side of the result in pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyemo.encoders import Preprocessing
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


class UnreadableImageError(DataError):
    """These bytes are no image; caught where images are read one by one."""


def read_pixels(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """(crop, crop, 3) uint8 RGB of an encoded image: scaled and cropped, not yet normalised.

    Raises:
        UnreadableImageError: Pillow cannot decode it, or it is smaller than the crop after scaling.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UnreadableImageError(f"{len(data)} bytes are no image that can be read ({error})") from error
    size = preprocessing.size
    width, height = pixels.size
    if preprocessing.resize == "exact":
        width, height = size, size
    else:
        shorter = min(width, height)
        width, height = size * width // shorter, size * height // shorter
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
    crop = preprocessing.crop
    left, top = (width - crop) // 2, (height - crop) // 2
    return np.asarray(pixels.crop((left, top, left + crop, top + crop)))
