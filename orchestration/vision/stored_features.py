"""A split of a feature data set in S3 as `tinyemo.features` has a file's."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from orchestration.data.manifest import load_manifest, read_file
from orchestration.streaming.feature_stream import features_array
from tinyemo.errors import DataError
from tinyemo.features import FeatureTable


def read_stored_features(uri: str, split: str) -> FeatureTable:
    """Rows of a split in their stored order, each shard checked against its sha256.

    Args:
        uri: S3 address of a feature data set, its newest version or one.
        split: for instance test.

    Raises:
        DataError: there is no such data set or split, or a shard is corrupt.
        StorageError: S3 cannot be read.
    """
    manifest = load_manifest(uri, "features")
    if split not in manifest.splits:
        raise DataError(f"{manifest.uri} has no split {split!r}: it has {', '.join(sorted(manifest.splits))}")
    shards = [shard for shard in manifest.shards if shard.split == split]
    columns = ["id", "label", "features"]
    tables = [pq.read_table(pa.BufferReader(read_file(manifest, shard)), columns=columns) for shard in shards]
    table = pa.concat_tables(tables).combine_chunks()
    return FeatureTable(
        ids=table["id"].to_pylist(),
        labels=table["label"].to_pylist(),
        features=torch.from_numpy(features_array(table).astype(np.float32)),
        encoder=manifest.encoder,
    )
