"""Photographs with labels as instruct records, and the work that makes features of them."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from record_files import record

from orchestration.assets.model_files import choose_encoder, describe_choice
from orchestration.data.features import FeatureJob, PoolConfig
from orchestration.data.manifest import Manifest
from orchestration.services import storage
from tinyemo.encoders import EncoderInfo
from tinyemo.taxonomies import TAXONOMIES

EKMAN = TAXONOMIES["ekman"].words
CLIP_WIDTH = 512
OTHER = EncoderInfo(name="other", revision="r", preprocessing="p")


def photograph(number: int) -> bytes:
    """A JPEG of its own, wider than high."""
    generator = np.random.default_rng(number)
    coarse = generator.integers(0, 255, (4, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(coarse).resize((60, 40), Image.Resampling.BICUBIC).save(sink, "JPEG")
    return sink.getvalue()


def with_image(number: int, image: bytes, **changed: Any) -> dict[str, Any]:
    sha256 = hashlib.sha256(image).hexdigest()
    return record(number, image=image, image_sha256=sha256, width=60, height=40, **changed)


def photographed(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Records with labels in turn; every third photograph has a second record, every fifth no label."""
    rows = []
    for number in range(first, first + count):
        label = None if number % 5 == 4 else EKMAN[number % 6]
        rows.append(with_image(number, photograph(number), label=label))
        if number % 3 == 0:
            rows.append(with_image(number, photograph(number), label=None) | {"id": f"again{number}"})
    return rows


def job_for(source: Manifest, folder: Path, uri: str, **changed: Any) -> FeatureJob:
    choice = choose_encoder(str(folder))
    fields: dict[str, Any] = {"has_patches": True, "pool": PoolConfig(batch_size=4), "run": "r"} | changed
    return FeatureJob(source, choice, describe_choice(choice), uri, **fields)


def read_table(uri: str) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(uri)), page_checksum_verification=True)


def matrix(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    return np.stack(column.to_pylist()).astype(np.float32)
