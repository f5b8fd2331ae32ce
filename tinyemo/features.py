"""Pooled image features in a Parquet file, with or without labels.

Shape letters: N rows, d encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tinyemo.encoders import EncoderInfo, encoder_in_metadata
from tinyemo.errors import DataError

LABEL_COLUMNS = ("emotion", "label")


@dataclass(frozen=True)
class FeatureTable:
    """Rows of a feature file in the file's order."""

    ids: list[str]
    """N names of images."""
    labels: list[str] | None
    """N words as they stand in the file; None where it has no label column."""
    features: Tensor
    """(N, d) float32, finite."""
    encoder: EncoderInfo | None = None
    """Network that made the features; None if the file does not say."""


def read_features(path: Path) -> FeatureTable:
    """Read the columns `id`, `features` (lists of one width) and `emotion` or `label`, if any, of a Parquet file.

    Raises:
        DataError: the file is missing, corrupt or empty, a column is missing or of the wrong type, widths differ, or a
            value is not finite.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file: give the path of a Parquet file with columns id and features")
    try:
        schema = pq.read_schema(path)
        label_column = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        missing = [name for name in ("id", "features") if name not in schema.names]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}: it needs id and features, and has {schema.names}")
        columns = ["id", "features", *([label_column] if label_column else [])]
        table = pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())}") from error
    if table.num_rows == 0:
        raise DataError(f"{path} holds no rows")
    return FeatureTable(
        ids=[str(name) for name in table["id"].to_pylist()],
        labels=_read_labels(path, table[label_column]) if label_column else None,
        features=_read_matrix(path, table["features"]),
        encoder=encoder_in_metadata(schema.metadata, str(path)),
    )


def _read_labels(path: Path, column: pa.ChunkedArray) -> list[str]:
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)) or column.null_count:
        raise DataError(f"{path}: the label column must hold text in every row, it holds {column.type}")
    labels: list[str] = column.to_pylist()
    return labels


def _read_matrix(path: Path, column: pa.ChunkedArray) -> Tensor:
    kind = column.type
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{path}: column 'features' must hold lists of float16, float32 or float64, it holds {kind}")
    widths = set(pc.list_value_length(column).unique().to_pylist())
    if len(widths) != 1 or None in widths:
        found = ", ".join(sorted(str(width) for width in widths))
        raise DataError(f"{path}: column 'features' must hold a list of one width in every row, found {found}")
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    features = torch.from_numpy(values.reshape(len(lists), int(widths.pop())))
    is_finite = features.isfinite().all(dim=1)
    if not bool(is_finite.all()):
        raise DataError(
            f"{path}: {int((~is_finite).sum())} of {len(lists)} rows hold NaN or Inf, the first is row "
            f"{int((~is_finite).nonzero()[0])}: take them out (`tinyemo ingest features` does)"
        )
    return features
