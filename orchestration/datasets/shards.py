"""One version of a data set on its way into S3: shards, index and rejected rows; never the manifest itself."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from orchestration.assets.inputs import Input
from orchestration.datasets.manifest import INDEX_SCHEMA, VERSION_LENGTH, FeatureManifest, Rejected, Shard, SplitCounts
from orchestration.datasets.validation import Rejection
from orchestration.datasets.versions import Advance, open_uploads
from tinyemo.taxonomies import label_id


@dataclass(frozen=True)
class Version:
    """Where a version goes and how it is cut."""

    uri: str
    name: str
    taxonomy: str
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


def store_version(version: Version, rows: Input, plan: Plan, staged: IO[bytes], advance: Advance) -> FeatureManifest:
    """Store shards, index and rejected rows; the manifest that may be written when this returns."""
    reasons = Counter(str(rejection.reason) for rejection in plan.rejections)
    shards: list[Shard] = []
    num_shards = sum(-(-(end - first) // version.rows_per_shard) for first, end in plan.offsets.values())
    with open_uploads(version.uri) as uploads:
        for split, (first, end) in plan.offsets.items():
            for number, start in enumerate(range(first, end, version.rows_per_shard)):
                part = plan.table.slice(start, min(version.rows_per_shard, end - start))
                features = _staged_rows(staged, part["position"].to_numpy(), rows)
                stored = uploads.put(f"{split}-{number:05d}.parquet", _shard_bytes(part, features))
                shards.append(Shard(**stored.model_dump(), split=split, rows=part.num_rows))
                advance("upload", len(shards), num_shards)
        index = uploads.put("index.parquet", parquet_bytes(_index_table(plan, version.rows_per_shard)))
        rejected = uploads.put("rejected.parquet", parquet_bytes(rejected_table(plan.rejections)))
    labels = plan.table["label"]
    return FeatureManifest(
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
        rows_per_shard=version.rows_per_shard,
        rows_in=plan.table.num_rows + len(plan.rejections),
        splits={
            split: SplitCounts(
                rows=end - first, labels=dict(sorted(Counter(labels.slice(first, end - first).to_pylist()).items()))
            )
            for split, (first, end) in plan.offsets.items()
        },
        shards=shards,
        index=index,
        rejected=Rejected(**rejected.model_dump(), rows=len(plan.rejections), reasons=dict(sorted(reasons.items()))),
        uri=version.uri,
    )


def _label_ids(labels: pa.ChunkedArray) -> pa.Array:
    return pa.array([label_id(label) for label in labels.to_pylist()], pa.int32())


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
            "label_id": _label_ids(part["label"]),
            "features": pa.FixedSizeListArray.from_arrays(values, features.shape[1]),
        }
    )
    return parquet_bytes(table)


def _index_table(plan: Plan, rows_per_shard: int) -> pa.Table:
    """One line per kept row, in storage order."""
    shard, row, first_shard = [], [], 0
    for first, end in plan.offsets.values():
        numbers = np.arange(end - first)
        shard.append(first_shard + numbers // rows_per_shard)
        row.append(numbers % rows_per_shard)
        first_shard += -(-(end - first) // rows_per_shard)
    columns = [
        plan.table["split"],
        _label_ids(plan.table["label"]),
        plan.table["id_hash"],
        pa.array(np.concatenate(shard), pa.int32()),
        pa.array(np.concatenate(row), pa.int32()),
    ]
    return pa.table(columns, schema=INDEX_SCHEMA)


def rejected_table(rejections: list[Rejection]) -> pa.Table:
    """One line per row that is not kept."""
    fields = [("split", pa.string()), ("id", pa.string()), ("label", pa.string())]
    fields += [("row", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
    return pa.table(
        {name: pa.array([getattr(rejection, name) for rejection in rejections], kind) for name, kind in fields}
    )


def parquet_bytes(table: pa.Table) -> bytes:
    """A Parquet file of one row group; features stay uncompressed, floats do not shrink."""
    words = [name for name in table.column_names if name != "features"]
    compression = {name: "zstd" for name in words} | {"features.list.element": "none"}
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=max(1, table.num_rows),
        use_dictionary=[name for name in words if name in ("label", "split", "reason")],
        compression=compression,
        write_statistics=words,
    )
    return buffer.getvalue()
