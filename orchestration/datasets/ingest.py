"""Feature rows into S3: validate, shard, upload, and the manifest last.

    input batches -> RowValidator -> features to a temporary file, hashes in memory -> digest
                  -> shards, index, rejected rows -> manifest.json -> latest.json

A version is named by its digest, so a new version never touches the files of another one, and whoever reads
`latest.json` sees the old version until the new one is whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc

from orchestration.assets.inputs import Input, generated_input, open_parquet_input
from orchestration.data.ingest import IngestReport
from orchestration.data.manifest import (
    VERSION_LENGTH,
    Advance,
    check_destination,
    existing_version,
    held_out_rank,
    id_hash,
    point_latest_at,
    publish,
)
from orchestration.datasets.shards import Plan, Version, store_version
from orchestration.datasets.validation import Kept, Rejection, RowValidator
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import Taxonomy, describe_taxonomy, find_taxonomy

logger = logging.getLogger(__name__)

ROWS_PER_SHARD = 512


def ingest_features(
    source: Path | str | None,
    *,
    name: str,
    root: str,
    taxonomy: str = "ekman",
    split: str | None = None,
    is_generated: bool = False,
    seed: int = 0,
    feature_width: int | None = None,
    rows_per_shard: int = ROWS_PER_SHARD,
    is_forced: bool = False,
    advance: Advance | None = None,
) -> IngestReport:
    """Store a data set's features under `<root>/<name>/<version>` and point `<root>/<name>/latest.json` at it.

    Args:
        source: a folder of <split>.parquet files, a Parquet file, or the name of an asset; None with `is_generated`.
        name: the data set's name in S3.
        root: `s3://bucket/folder`.
        taxonomy: the labels that are allowed; other rows are rejected.
        split: the split of a single Parquet file that has no column `split`.
        is_generated: store seeded noise instead of `source`; the manifest says so in `data`.
        seed: of the generated rows.
        feature_width: D; None takes it from the train split.
        rows_per_shard: rows of a Parquet file in S3.
        is_forced: upload again even where the version is there.
        advance: told about progress, for instance to draw a bar.

    Raises:
        ConfigError: where the arguments do not go together.
        DataError: where a file cannot be read or no row can be kept.
        StorageError: where S3 fails; the former version stays the latest.
    """
    started = time.monotonic()
    chosen = find_taxonomy(taxonomy)
    if rows_per_shard < 1:
        raise ConfigError(f"rows_per_shard is {rows_per_shard}: it must be at least 1")
    check_destination(name, root)
    advance = advance or (lambda stage, done, total: None)
    rows = _open_input(source, chosen, split=split, is_generated=is_generated, seed=seed, feature_width=feature_width)
    with tempfile.TemporaryFile(prefix="tinyemo-ingest-") as staged:
        plan = _plan_rows(rows, chosen, rows_per_shard, staged, advance)
        uri = f"{root.rstrip('/')}/{name}/{plan.digest[:VERSION_LENGTH]}"
        existing = None if is_forced else existing_version(uri, plan.digest)
        if existing is not None:
            if existing.encoder != rows.encoder:  # the same rows, and now we know who made them, or no longer do
                existing = existing.model_copy(update={"encoder": rows.encoder})
                publish(existing)
            point_latest_at(existing)
            return IngestReport(existing, True, 0, 0, time.monotonic() - started)
        storage.delete(f"{uri}/manifest.json")  # while its files are written again, the version is not whole
        version = Version(uri=uri, name=name, taxonomy=chosen, rows_per_shard=rows_per_shard)
        manifest = store_version(version, rows, plan, staged, advance)
    publish(manifest)
    files = list(manifest.files())
    return IngestReport(manifest, False, len(files), sum(f.num_bytes for f in files), time.monotonic() - started)


def _open_input(
    source: Path | str | None,
    taxonomy: Taxonomy,
    *,
    split: str | None,
    is_generated: bool,
    seed: int,
    feature_width: int | None,
) -> Input:
    if is_generated == (source is not None):
        raise ConfigError("name either a source or --generated, not both")
    if source is None:
        return generated_input(taxonomy.words, feature_width=feature_width or 768, seed=seed)
    return _open_source(str(source), split=split, feature_width=feature_width)


def _open_source(source: str, *, split: str | None, feature_width: int | None) -> Input:
    path = Path(source)
    if path.exists():
        description = {"kind": "folder" if path.is_dir() else "file", "name": path.name}
        return open_parquet_input(path, split=split, feature_width=feature_width, description=description)
    from orchestration.assets.catalogue import asset_names, find_asset, get_asset, read_provenance

    if source not in asset_names():
        raise DataError(f"{source} is neither a file, a folder nor an asset: assets are {', '.join(asset_names())}")
    folder = get_asset(source)
    description = {"kind": "asset", "name": source, **read_provenance(folder)}
    rows = open_parquet_input(folder, split=split, feature_width=feature_width, description=description)
    return replace(rows, encoder=find_asset(source).encoder)


def _plan_rows(rows: Input, taxonomy: Taxonomy, rows_per_shard: int, staged: IO[bytes], advance: Advance) -> Plan:
    """Validate every row; features of the good ones go to `staged` in the order in which they come."""
    validator = RowValidator(feature_width=rows.feature_width, feature_dtype=rows.feature_dtype, taxonomy=taxonomy)
    for batch in rows.batches():
        validator.check(batch).tofile(staged)
        advance("validate", validator.num_rows, rows.num_rows)
    staged.flush()
    kept = validator.finish()
    rejections = sorted(validator.rejections, key=lambda r: (r.split or "", r.id or "", r.reason, r.row))
    if validator.num_rows != len(kept.ids) + len(rejections):
        raise AssertionError(f"{validator.num_rows} rows in, {len(kept.ids)} kept, {len(rejections)} rejected")
    for split in kept.splits.unique().to_pylist():
        if not re.fullmatch(r"\w[\w.-]*", split):
            raise DataError(f"split is {split!r}: use letters, digits, underscores, dots and dashes")
    reasons = Counter(str(rejection.reason) for rejection in rejections)
    if not len(kept.ids):
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        raise DataError(f"none of {validator.num_rows} rows can be kept: {counts}")
    table = _in_storage_order(kept)
    names = table["split"].to_pylist()
    offsets = {}
    for split in dict.fromkeys(names):
        first = names.index(split)
        offsets[split] = (first, first + names.count(split))
    for split in {r.split for r in rejections if r.split} - offsets.keys():
        logger.warning("every row of split %s is rejected", split)
    return Plan(table, offsets, rejections, _digest(rows, taxonomy, rows_per_shard, table, rejections))


def _in_storage_order(kept: Kept) -> pa.Table:
    splits = sorted(set(kept.splits.unique().to_pylist()), key=held_out_rank, reverse=True)  # train first
    table = pa.table(
        {
            "split": kept.splits,
            "id": kept.ids,
            "label": kept.labels,
            "id_hash": pa.array([id_hash(sample_id) for sample_id in kept.ids.to_pylist()], pa.uint64()),
            "vector_hash": kept.vector_hashes,
            "position": pa.array(kept.positions, pa.int64()),
            "rank": pc.index_in(kept.splits, pa.array(splits)),
        }
    )
    order = [("rank", "ascending"), ("id_hash", "ascending"), ("id", "ascending")]
    return table.sort_by(order).drop_columns(["rank"]).combine_chunks()


def _digest(rows: Input, taxonomy: Taxonomy, rows_per_shard: int, table: pa.Table, rejections: list[Rejection]) -> str:
    """sha256 over everything that a reader of the version can see, and over nothing else."""
    header = [1, rows.data, rows.feature_width, rows.feature_dtype, describe_taxonomy(taxonomy), rows_per_shard]
    digest = hashlib.sha256(json.dumps(header).encode())
    for batch in table.select(["split", "id", "label", "vector_hash"]).to_batches(max_chunksize=4096):
        for split, sample_id, label, vector in zip(*(column.to_pylist() for column in batch), strict=True):
            digest.update(json.dumps([split, sample_id, label, vector.hex()]).encode())
    for rejection in rejections:
        line = [rejection.split, rejection.id, rejection.label, str(rejection.reason)]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()
