"""Checks of the image of a record: its place, whether it is whole, and the bytes that are stored."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import imagehash
import numpy as np
from PIL import Image, UnidentifiedImageError

from orchestration.data.ingest_rules import CONVERTIBLE_FORMATS, KEPT_FORMATS, IngestRules, Reason
from orchestration.data.record_checks import quoted, reject
from orchestration.services import storage
from tinyemo.errors import DataError, first_line, one_line

OPENED_FORMATS = [name for name in (*KEPT_FORMATS, *CONVERTIBLE_FORMATS) if name != "MPO"]  # JPEG opens MPO
KEPT_MODES = frozenset({"RGB", "L"})
FLAT_DEVIATION = 2.0
"""Grey levels. Below this standard deviation a picture is one colour, and its perceptual hash is noise."""
MAX_WHOLE_PIXELS = 4_000_000
"""A JPEG with more pixels is decoded in reduced size for its hash: 7,000 x 7,000 would take 240 MB."""
HASHED_SIDE = 512
READ_AHEAD = 8
"""Images that may be on their way to a task while it decodes."""

MAX_KEY_BYTES = 900
"""S3 allows 1,024, the root included."""

_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL})


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image that keeps the rules."""

    sha256: str
    """sha256 of the bytes that are stored."""
    num_bytes: int
    """Number of bytes that are stored."""
    width: int
    height: int
    phash: int | None
    """64-bit perceptual hash; None where the image is flat."""


def path_under_root(image: str, root: str, foreign_root: str) -> str:
    """Return the path of a record's image below the root, with no dots in it.

    Raises:
        RejectedRecordError: image_outside_root.
    """
    path = image
    for prefix in (foreign_root, root):
        start = prefix.rstrip("/") + "/"
        if prefix and path.startswith(start):
            path = path[len(start) :]
            break
    else:
        if "://" in path or path.startswith("/"):
            hint = f"nor under foreign_root {foreign_root}" if foreign_root else "and foreign_root is not set"
            reject(Reason.IMAGE_OUTSIDE_ROOT, f"{quoted(image)} is not under the images' root, {hint}")
    path = posixpath.normpath(path.lstrip("/"))
    if path == ".." or path.startswith("../"):
        reject(Reason.IMAGE_OUTSIDE_ROOT, f"{quoted(image)} leads out of the images' root")
    return path


def require_root(root: str) -> None:
    """Raise DataError where the images' folder is not on this node; an S3 address passes."""
    if not root.startswith("s3://") and not os.path.isdir(root):
        node = os.uname().nodename
        raise DataError(f"{root} is no folder on {node}: put the images where every node sees them, or into S3")


def read_image(path: str, root: str, max_bytes: int) -> bytes:
    """Return the bytes of an image file under the root.

    Raises:
        RejectedRecordError: image_missing, image_unreadable, image_too_large, image_outside_root.
        StorageError: S3 fails.
    """
    data = _read_object(path, root, max_bytes) if root.startswith("s3://") else _read_file(path, root, max_bytes)
    if len(data) > max_bytes:
        reject(Reason.IMAGE_TOO_LARGE, f"{quoted(path)} has more than max_image_bytes {max_bytes} bytes")
    return data


def _read_object(path: str, root: str, max_bytes: int) -> bytes:
    if any(character in "?#" or ord(character) < 32 for character in path) or len(path.encode()) > MAX_KEY_BYTES:
        reject(Reason.IMAGE_MISSING, f"{quoted(path)} cannot stand in an S3 address")
    try:
        return storage.read_bytes(f"{root.rstrip('/')}/{path}", length=max_bytes + 1)
    except storage.MissingObjectError:
        reject(Reason.IMAGE_MISSING, f"{quoted(path)} does not exist")


def _read_file(path: str, root: str, max_bytes: int) -> bytes:
    try:
        real_root, real = os.path.realpath(root), os.path.realpath(os.path.join(root, path))
        if os.path.commonpath([real_root, real]) != real_root:
            reject(Reason.IMAGE_OUTSIDE_ROOT, f"{quoted(path)} is a link that leads out of the images' root")
        # The path is real, so a link in its place was put there after the check above; a pipe must not block.
        descriptor = os.open(real, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            reject(Reason.IMAGE_MISSING, f"{quoted(path)} is no file")
        with open(descriptor, "rb") as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        if error.errno in _NO_FILE:
            reject(Reason.IMAGE_MISSING, f"{quoted(path)} does not exist")
        reject(Reason.IMAGE_UNREADABLE, f"{quoted(path)} cannot be read ({error.strerror})")
    except ValueError as error:  # a null character in the path
        reject(Reason.IMAGE_MISSING, f"{quoted(path)} names no file ({error})")


def read_ahead(paths: Iterable[str], root: str, max_bytes: int) -> Iterator[tuple[str, Future[bytes]]]:
    """Yield each path with its bytes to come, in order; READ_AHEAD of them are read while the caller works."""
    with ThreadPoolExecutor(storage.TRANSFER_THREADS, thread_name_prefix="image") as pool:
        waiting: deque[tuple[str, Future[bytes]]] = deque()
        for path in paths:
            waiting.append((path, pool.submit(read_image, path, root, max_bytes)))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft()
        yield from waiting


def inspect_image(data: bytes, rules: IngestRules) -> ImageFacts:
    """Return the facts about an image after it was decoded whole.

    Raises:
        RejectedRecordError: it breaks a rule, is broken itself, or is no image.
    """
    image = _open(data, rules)
    stored, size = data, image.size
    if _is_converted(image):
        image, stored = _convert(image)
    elif image.width * image.height > MAX_WHOLE_PIXELS:
        image.draft(
            "L", (HASHED_SIDE, HASHED_SIDE)
        )  # a JPEG is decoded at an eighth of its size, all of its bytes read
    _load(image)
    return ImageFacts(hashlib.sha256(stored).hexdigest(), len(stored), *size, perceptual_hash(image))


def stored_image(data: bytes, rules: IngestRules) -> tuple[bytes, int, int]:
    """Return the bytes that are stored of an image, its width and its height; it is decoded only to convert it.

    Raises:
        RejectedRecordError: it breaks a rule.
    """
    image = _open(data, rules)
    if _is_converted(image):
        image, data = _convert(image)
    return data, *image.size


def perceptual_hash(image: Image.Image) -> int | None:
    """Return 64 bits that are alike for a picture and its scaled or re-saved copies; None where it is flat."""
    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    if np.asarray(grey).std() < FLAT_DEVIATION:
        return None
    return int(str(imagehash.phash(grey)), 16)


def _open(data: bytes, rules: IngestRules) -> Image.Image:
    """Return the image by its header, which keeps the rules; no pixel is decoded."""
    if not data:
        reject(Reason.IMAGE_UNREADABLE, "the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=OPENED_FORMATS)
        num_frames = getattr(image, "n_frames", 1)
    except UnidentifiedImageError:
        reject(Reason.IMAGE_UNREADABLE, f"none of the formats {', '.join(OPENED_FORMATS)}")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reject(Reason.IMAGE_TOO_LARGE, first_line(error))
    except Exception as error:  # noqa: BLE001  # a broken file makes Pillow's readers raise whatever they stumble over
        _reject_broken(error)
    name, (width, height) = str(image.format), image.size
    if width * height > rules.max_pixels:
        reject(Reason.IMAGE_TOO_LARGE, f"{width} x {height} pixels, max_pixels is {rules.max_pixels}")
    if min(width, height) < rules.min_side:
        reject(Reason.IMAGE_TOO_SMALL, f"{width} x {height} pixels, min_side is {rules.min_side}")
    if name not in KEPT_FORMATS and name not in rules.convert_formats:
        reject(Reason.IMAGE_FORMAT, f"{name} is not JPEG, PNG, WebP nor one of convert_formats")
    if num_frames > 1 and name != "MPO" and rules.animated == "reject":
        reject(Reason.IMAGE_ANIMATED, f"{num_frames} frames in a {name} file")
    if image.mode not in KEPT_MODES and image.mode not in rules.convert_modes:
        reject(Reason.IMAGE_MODE, f"mode {image.mode} is not RGB, L nor one of convert_modes")
    return image


def _is_converted(image: Image.Image) -> bool:
    is_animated = image.format != "MPO" and getattr(image, "n_frames", 1) > 1
    return image.format not in KEPT_FORMATS or image.mode not in KEPT_MODES or is_animated


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # noqa: BLE001  # see _open
        _reject_broken(error)


def _convert(image: Image.Image) -> tuple[Image.Image, bytes]:
    """Return the (first) picture in RGB or L, white where it is transparent, and its bytes as PNG."""
    _load(image)
    try:
        if image.has_transparency_data:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            image = opaque
        plain = image.convert("L" if image.mode in ("1", "L") else "RGB")
    except ValueError as error:  # convert_modes names one that Pillow has no way from
        reject(Reason.IMAGE_MODE, one_line(error))
    plain.info.clear()  # a colour profile or a transparent colour of the former mode would be written with it
    buffer = io.BytesIO()
    plain.save(buffer, "PNG")
    return plain, buffer.getvalue()


def _reject_broken(error: Exception) -> NoReturn:
    is_truncated = "truncated" in str(error).lower()
    reject(Reason.IMAGE_TRUNCATED if is_truncated else Reason.IMAGE_UNREADABLE, one_line(error))
