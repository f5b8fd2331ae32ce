"""One version of a data set on its way into S3: shards, index and rejected rows; never the manifest itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orchestration.assets.inputs import Input
from orchestration.data.manifest import (
    REJECTED_SCHEMA,
    VERSION_LENGTH,
    Advance,
    Manifest,
    Shard,
    count_splits,
    parquet_bytes,
    put_file,
    put_index,
    put_rejected,
)
from orchestration.datasets.validation import Rejection
from tinyemo.taxonomies import Taxonomy


@dataclass(frozen=True)
class Version:
    """Where a version goes and how it is cut."""

    uri: str
    name: str
    taxonomy: Taxonomy
    rows_per_shard: int


@dataclass(frozen=True)
class Plan:
    """The kept rows in the order in which they are stored: by split, then by id hash."""

    table: pa.Table
    """split, id, label, id_hash, vector_hash, position."""
    offsets: dict[str, tuple[int, int]]
    """Split -> first row and end row in `table`."""
    rejections: list[Rejection]
    digest: str


def store_version(version: Version, rows: Input, plan: Plan, staged: IO[bytes], advance: Advance) -> Manifest:
    """Store shards, index and rejected rows; the manifest that may be written when this returns."""
    shards: list[Shard] = []
    num_shards = sum(-(-(end - first) // version.rows_per_shard) for first, end in plan.offsets.values())
    for split, (first, end) in plan.offsets.items():
        for number, start in enumerate(range(first, end, version.rows_per_shard)):
            part = plan.table.slice(start, min(version.rows_per_shard, end - start))
            features = _staged_rows(staged, part["position"].to_numpy(), rows)
            stored = put_file(version.uri, f"{split}-{number:05d}.parquet", _shard_bytes(part, features))
            shards.append(Shard(**stored.model_dump(), split=split, rows=part.num_rows))
            advance("upload", len(shards), num_shards)
    index = put_index(version.uri, plan.table, [shard.rows for shard in shards])
    rejected = put_rejected(version.uri, rejected_table(plan.rejections))
    return Manifest(
        kind="features",
        name=version.name,
        version=plan.digest[:VERSION_LENGTH],
        digest=plan.digest,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        data=rows.data,
        source=rows.description,
        feature_width=rows.feature_width,
        feature_dtype=rows.feature_dtype,
        encoder=rows.encoder,
        taxonomy=version.taxonomy,
        rows_per_group=version.rows_per_shard,
        rows_in=plan.table.num_rows + len(plan.rejections),
        splits=count_splits(plan.table),
        shards=shards,
        index=index,
        rejected=rejected,
        uri=version.uri,
    )


def _staged_rows(staged: IO[bytes], positions: npt.NDArray[np.int64], rows: Input) -> npt.NDArray[np.floating]:
    """(N, D) features at the positions (N,); read, not mapped: pages of a map stay in this process's memory."""
    features = np.empty((len(positions), rows.feature_width), dtype=rows.feature_dtype)
    for row, position in zip(features, positions.tolist(), strict=True):
        num_read = os.preadv(staged.fileno(), [row.data], position * row.nbytes)
        if num_read != row.nbytes:
            raise OSError(f"{num_read} of {row.nbytes} bytes of row {position} were read from the temporary file")
    return features


def _shard_bytes(part: pa.Table, features: npt.NDArray[np.floating]) -> bytes:
    """One shard, (N, D) features, as Parquet."""
    values = pa.array(features.ravel())
    table = pa.table(
        {
            "id": part["id"],
            "label": part["label"],
            "features": pa.FixedSizeListArray.from_arrays(values, features.shape[1]),
        }
    )
    return parquet_bytes(table)


def rejected_table(rejections: list[Rejection]) -> pa.Table:
    """Return REJECTED_SCHEMA, one line for each row that is not kept."""
    rows = [
        {
            "number": rejection.row + 1,
            "split": rejection.split,
            "id": rejection.id,
            "label": rejection.label,
            "reason": str(rejection.reason),
            "detail": rejection.detail,
        }
        for rejection in rejections
    ]
    return pa.Table.from_pylist(rows, REJECTED_SCHEMA)
