"""Ingests of small feature data sets, and what they leave in S3."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.data.ingest import IngestReport, ingest_features
from orchestration.data.manifest import Manifest
from orchestration.services import storage
from tinyemo.errors import TinyEmoError


def ingest(source: Path | str | None, root: str, **options: object) -> IngestReport:
    return ingest_features(source, **{"name": "small", "root": root, "rows_per_shard": 16, **options})  # type: ignore[arg-type]


def read_file(manifest: Manifest, path: str) -> pa.Table:
    with storage.filesystem().open_input_file(manifest.file_uri(path).removeprefix("s3://")) as file:
        return pq.read_table(file)


def read_split(manifest: Manifest, split: str) -> pa.Table:
    return pa.concat_tables([read_file(manifest, shard.path) for shard in manifest.shards if shard.split == split])


def rejected(manifest: Manifest) -> list[dict[str, object]]:
    return read_file(manifest, manifest.rejected.path).to_pylist()


def assert_is_one_line(error: TinyEmoError, *parts: str) -> None:
    assert "\n" not in str(error)
    for part in parts:
        assert part in str(error)
