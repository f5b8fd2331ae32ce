"""Brightness, saturation, size and compression of the images of a data set, and scenes with one of these changed."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from orchestration.data.manifest import Manifest
from orchestration.data.stream import from_ipc, to_ipc
from orchestration.evaluate.scoring import run_parts
from orchestration.services import storage

COVARIATES = ("brightness", "saturation", "size", "bytes_per_pixel")
THUMBNAIL = 64
"""Side in pixels at which brightness and saturation are measured."""

CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.6),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.5),
    "half the size": lambda image: image.resize((max(image.width // 2, 1), max(image.height // 2, 1))),
    "JPEG quality 10": lambda image: _compressed(image, 10),
    "grey": lambda image: ImageEnhance.Color(image).enhance(0.0),
    "strong colours": lambda image: ImageEnhance.Color(image).enhance(2.0),
}
"""Changes to a scene that leave what it shows as it is."""


def _compressed(image: Image.Image, quality: int) -> Image.Image:
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality)
    return Image.open(data)


def changed(data: bytes, change: str) -> bytes:
    """Return an image file after a change, as PNG, so that nothing else changes it."""
    image = CHANGES[change](Image.open(io.BytesIO(data)).convert("RGB"))
    written = io.BytesIO()
    image.save(written, "PNG", compress_level=1)
    return written.getvalue()


def measure_image(data: bytes) -> tuple[float, float, float, float]:
    """Return the COVARIATES of an image file: two means in [0, 1], the root of its pixels, and bytes per pixel."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = image.width * image.height
        image.draft("RGB", (THUMBNAIL, THUMBNAIL))
        small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    hsv = np.asarray(small.convert("HSV"), np.float64) / 255
    brightness = float(np.asarray(small.convert("L")).mean() / 255)
    return brightness, float(hsv[..., 1].mean()), math.sqrt(pixels), len(data) / pixels


def image_covariates(images: Manifest, splits: Sequence[str]) -> pa.Table:
    """Return image_sha256 (text) and COVARIATES of each image of some splits, one Ray Data task for each shard.

    Raises:
        TinyEmoError: a shard is missing or corrupt, or S3 or Ray fails.
    """
    shards = [shard for split in splits if split in images.splits for shard in images.shards_of(split)]

    def work(batch: pa.Table) -> pa.Table:
        paths = [shards[row["shard"]].path for row in batch.to_pylist()]
        return pa.Table.from_pylist([{"measured": to_ipc(_measure(images, path))} for path in paths])

    items = [{"shard": place} for place in range(len(shards))]
    done = run_parts(items, work, is_local=False)
    tables = [from_ipc(row["measured"]) for table in done for row in table.to_pylist()]
    empty = {"image_sha256": pa.array([], pa.string()), **{name: pa.array([], pa.float64()) for name in COVARIATES}}
    return pa.concat_tables([pa.table(empty), *tables])


def _measure(images: Manifest, path: str) -> pa.Table:
    rows = [(sha256, *measure_image(data)) for sha256, data in _read(images, path)]
    columns = list(zip(*rows, strict=True)) or [()] * (len(COVARIATES) + 1)
    types = [pa.string(), *[pa.float64()] * len(COVARIATES)]
    arrays = [pa.array(list(values), kind) for values, kind in zip(columns, types, strict=True)]
    return pa.table(dict(zip(("image_sha256", *COVARIATES), arrays, strict=True)))


def _read(images: Manifest, path: str) -> Iterator[tuple[str, bytes]]:
    with storage.filesystem().open_input_file(images.file_uri(path).removeprefix("s3://")) as file:
        table = pq.read_table(file, columns=["image_sha256", "image"])
    yield from zip(table["image_sha256"].to_pylist(), table["image"].to_pylist(), strict=True)


def read_images(images: Manifest, splits: Sequence[str], wanted: set[str]) -> dict[str, bytes]:
    """Return the files of some images by their sha256."""
    found: dict[str, bytes] = {}
    for split in splits:
        for shard in images.shards_of(split) if split in images.splits else ():
            found |= {sha256: data for sha256, data in _read(images, shard.path) if sha256 in wanted}
            if len(found) == len(wanted):
                return found
    return found


def align(ids: pa.ChunkedArray, table: pa.Table) -> dict[str, NDArray[np.float64]]:
    """Return (N,) values of each covariate in the order of the ids, NaN where an image has none."""
    import pandas as pd

    frame = table.to_pandas().drop_duplicates("image_sha256").set_index("image_sha256")
    aligned = frame.reindex(pd.Index(ids.to_pandas()))
    return {name: aligned[name].to_numpy(np.float64) for name in COVARIATES}
