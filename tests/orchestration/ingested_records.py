"""Ingests of small instruct data sets, and what they leave in S3."""

from __future__ import annotations

import io
from typing import Any

import pyarrow.parquet as pq
from broken_records import RULES, Corpus

from orchestration.data.ingest import IngestReport, ingest_instruct
from orchestration.data.ingest_rules import Layout
from orchestration.data.manifest import Manifest
from orchestration.services import storage

LAYOUT = Layout(rows_per_group=4, shard_bytes=12_000, records_per_chunk=10)
"""Small, so that a few records make several chunks, shards and row groups."""


def ingest(corpus: Corpus, root: str, **options: Any) -> IngestReport:
    given = {"name": "broken", "rules": RULES, "layout": LAYOUT, **options}
    return ingest_instruct(corpus.records, corpus.images, root=root, **given)


def read_parquet(uri: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(storage.read_bytes(uri))).to_pylist()
    return rows


def rejected(manifest: Manifest) -> dict[int, dict[str, Any]]:
    return {row["number"]: row for row in read_parquet(manifest.file_uri(manifest.rejected.path))}


def stored(manifest: Manifest) -> list[dict[str, Any]]:
    """Every record, shard after shard."""
    return [row for shard in manifest.shards for row in read_parquet(manifest.file_uri(shard.path))]


def left_in(folder: str, name: str) -> list[str]:
    """What a data set's folder holds, without what belongs to a version."""
    return [uri.removeprefix(f"{folder}/") for uri in storage.list_prefix(f"{folder}/{name}")]
