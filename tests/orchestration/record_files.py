"""Small instruct data sets for tests of the reader: drawn pictures and texts of changing length, laid out as ours."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from orchestration.data.manifest import (
    RECORD_SCHEMA,
    FileRef,
    Manifest,
    Rejected,
    Shard,
    SplitCounts,
    publish,
    put_index,
)
from orchestration.services import storage


def drawn_picture(number: int, *, width: int = 40, height: int = 32, kind: str = "PNG") -> bytes:
    """An image whose colour says which record it belongs to."""
    pixels = np.full((height, width, 3), (number % 256, number // 256 % 256, 7), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, kind)
    return sink.getvalue()


def record(number: int, prefix: str = "r", **changed: Any) -> dict[str, Any]:
    """One row of RECORD_SCHEMA; texts get longer with the number."""
    image = drawn_picture(number)
    return {
        "id": f"{prefix}{number:05d}",
        "image": image,
        "image_sha256": hashlib.sha256(image).hexdigest(),
        "width": 40,
        "height": 32,
        "task": "caption",
        "turns": [
            {"role": "human", "text": "<image>\nDescribe the image."},
            {"role": "gpt", "text": f"picture {number} " + "and more " * (number % 5)},
        ],
        "labels_offered": [],
        "label_stated": None,
        "label": None,
        "source": "drawn",
    } | changed


def write_records(
    root: str,
    rows: list[dict[str, Any]],
    *,
    name: str = "drawn",
    rows_per_group: int = 8,
    rows_per_shard: int = 50,
) -> Manifest:
    """A version of one split, train, in S3."""
    uri = f"{root}/{name}/{hashlib.sha256(repr([row['id'] for row in rows]).encode()).hexdigest()[:12]}"
    shards = []
    for place, start in enumerate(range(0, len(rows), rows_per_shard)):
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows[start : start + rows_per_shard], RECORD_SCHEMA)
        pq.write_table(
            table,
            sink,
            row_group_size=rows_per_group,
            write_page_checksum=True,
            compression="none",
            use_dictionary=False,
        )
        path = f"train-{place:05d}.parquet"
        shards.append(
            Shard(**put(uri, path, sink.getvalue()).model_dump(), split="train", rows=table.num_rows)
        )  # fmt: skip
    digest = hashlib.sha256(name.encode() + b"".join(shard.sha256.encode() for shard in shards)).hexdigest()
    empty = put(uri, "empty", b"")
    columns = {
        "split": ["train"] * len(rows),
        "label": pa.nulls(len(rows), pa.string()),
        "id": [row["id"] for row in rows],
        "image_sha256": [bytes.fromhex(row["image_sha256"]) for row in rows],
    }
    manifest = Manifest(
        kind="instruct",
        name=name,
        version=uri.rsplit("/", 1)[1],
        digest=digest,
        created_at="2026-11-23T00:00:00+00:00",
        data="generated",
        source={},
        taxonomy="ekman",
        rows_in=len(rows),
        splits={"train": SplitCounts(rows=len(rows), labels={})},
        shards=shards,
        index=put_index(uri, pa.table(columns), [shard.rows for shard in shards]),
        rejected=Rejected(**empty.model_dump(), rows=0, reasons={}),
        rows_per_group=rows_per_group,
        tasks={"train": {"caption": len(rows)}},
        rules={},
        card=empty,
        uri=uri,
    )
    publish(manifest)
    return manifest


def put(uri: str, path: str, data: bytes) -> FileRef:
    """Store one file."""
    storage.write_bytes(f"{uri}/{path}", data)
    return FileRef(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
