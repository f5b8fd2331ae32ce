"""Decoding of image files into pixels."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from tinyemo.encoders import Preprocessing
from tinyemo.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of the formats that are tried; rarer decoders are no risk then. JPEG includes MPO."""


class UnreadableImageError(DataError):
    """The bytes of one image cannot be decoded."""


def _open(data: bytes, size: int | None = None) -> Image.Image:
    """Decode an image to RGB; a JPEG is scaled down meanwhile to no less than `size`, which is several times faster.

    Raises:
        UnreadableImageError: these bytes are no whole image of a known format.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if size is not None:
                image.draft("RGB", (size, size))
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        kinds = "JPEG, PNG, WebP, BMP, GIF or TIFF"
        raise UnreadableImageError(f"{len(data)} bytes are no image that can be read (not {kinds})") from error
    except (Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise UnreadableImageError(f"{len(data)} bytes are no image that can be read ({error})") from error


def decode_image(data: bytes, size: int) -> NDArray[np.uint8]:
    """Return an image's centre square: the short side is scaled to `size` pixels (bicubic) and the rest cut off.

    Args:
        data: encoded image.
        size: side of the square, pixels.

    Returns:
        (size, size, 3) uint8 RGB.

    Raises:
        DataError: these bytes are no whole image.
    """
    try:
        pixels = _open(data, size)
    except UnreadableImageError as error:
        raise DataError(f"{error}: ingest the data set again") from error
    scale = size / min(pixels.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in pixels.size)
        pixels = pixels.resize((width, height), Image.Resampling.BICUBIC)
    return _crop(pixels, size)


def read_pixels(data: bytes, preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Return an image scaled and cropped for an encoder, not yet normalised.

    Args:
        data: encoded image.
        preprocessing: preprocessing of the encoder.

    Returns:
        (crop, crop, 3) uint8 RGB.

    Raises:
        UnreadableImageError: these bytes are no whole image.
    """
    pixels = _open(data)
    size = preprocessing.size
    width, height = pixels.size
    if preprocessing.resize == "exact":
        width, height = size, size
    else:
        shorter = min(width, height)
        width, height = size * width // shorter, size * height // shorter
    if pixels.size != (width, height):
        pixels = pixels.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
    return _crop(pixels, preprocessing.crop)


def _crop(pixels: Image.Image, size: int) -> NDArray[np.uint8]:
    left, top = (pixels.width - size) // 2, (pixels.height - size) // 2
    return np.asarray(pixels.crop((left, top, left + size, top + size)))
