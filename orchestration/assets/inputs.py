"""Feature rows as they come from a user: Parquet files or seeded noise, read in batches, never whole.

N rows of a batch, D feature width.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tinyemo.encoders import EncoderInfo, encoder_in_metadata
from tinyemo.errors import DataError

BATCH_ROWS = 1024
READ_BUFFER_BYTES = 1 << 20
FeatureDtype = Literal["float16", "float32"]

GENERATED_ROWS = {"train": 200, "test": 50}
"""Rows per label of the generated data set."""
GENERATED_SPREAD = 0.06
"""Distance of a generated cluster's centre from the origin, per dimension, in units of the noise."""


@dataclass(frozen=True)
class RowBatch:
    """N rows of one file, columns side by side."""

    file: str
    """Name of the file, for messages."""
    start: int
    """Position in the file of the first row."""
    splits: pa.Array
    """(N,) string, nullable."""
    ids: pa.Array
    """(N,) string, nullable."""
    labels: pa.Array
    """(N,) string, nullable, as the user wrote them."""
    features: pa.Array
    """(N,) list of floats, nullable."""


@dataclass(frozen=True)
class Input:
    """A data set before validation."""

    description: dict[str, Any]
    """Goes into the manifest as `source`."""
    data: Literal["real", "generated"]
    feature_width: int
    feature_dtype: FeatureDtype
    num_rows: int
    batches: Callable[[], Iterator[RowBatch]]
    encoder: EncoderInfo | None = None
    """Which network made the features; None where nothing says so."""


def sha256_of_file(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find_files(source: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """Each Parquet file of `source` with its split; None where a column `split` says it row by row."""
    if source.is_dir():
        if split is not None:
            raise DataError(f"--split {split} goes with a single file, {source} is a folder of <split>.parquet files")
        files = sorted(source.glob("*.parquet"))
        if not files:
            raise DataError(f"{source} holds no <split>.parquet file")
        return [(path, path.stem) for path in files]
    if not source.is_file():
        raise DataError(f"{source} does not exist: name a folder, a Parquet file or an asset")
    return [(source, split)]


def _open_parquet(path: Path, split: str | None) -> pq.ParquetFile:
    """An open file with the columns that ingest needs.

    Raises:
        DataError: where it is corrupt, empty or lacks a column.
    """
    try:
        # Buffered: otherwise the whole column of a row group comes into memory at once.
        file = pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({_first_line(error)}): write it again") from error
    names = file.schema_arrow.names
    missing = [name for name in ("id", "features") if name not in names]
    if "emotion" not in names and "label" not in names:
        missing.append("emotion (or label)")
    if split is None and "split" not in names:
        missing.append("split (or the option --split)")
    if missing:
        raise DataError(f"{path} lacks the column(s) {', '.join(missing)}: it has {', '.join(names)}")
    kind = file.schema_arrow.field("features").type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    if not is_list or not pa.types.is_floating(kind.value_type):
        raise DataError(f"{path}: column features is {kind}, it must be a list of float16, float32 or float64")
    if file.metadata.num_rows == 0:
        raise DataError(f"{path} has no rows: leave it out or fill it")
    return file


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_batches(path: Path, split: str | None) -> Iterator[RowBatch]:
    with _open_parquet(path, split) as file:
        names = file.schema_arrow.names
        label = "emotion" if "emotion" in names else "label"
        columns = ["id", label, "features", *([] if split else ["split"])]
        start = 0
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                splits = pa.repeat(pa.scalar(split), len(batch)) if split else pc.cast(batch["split"], pa.string())
                ids, labels = (pc.cast(batch[name], pa.string()) for name in ("id", label))
                yield RowBatch(path.name, start, splits, ids, labels, batch["features"])
                start += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is corrupt after row {start} ({_first_line(error)}): write it again") from error


def _width_of(path: Path, split: str | None) -> int:
    """The fixed width of the features, or the most common one of the first batch."""
    with _open_parquet(path, split) as file:
        kind = file.schema_arrow.field("features").type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    lengths: Counter[int | None] = Counter(pc.list_value_length(next(_read_batches(path, split)).features).to_pylist())
    lengths.pop(None, None)
    lengths.pop(0, None)
    if not lengths:
        raise DataError(f"{path}: the first {BATCH_ROWS} rows have no features")
    return int(lengths.most_common(1)[0][0] or 0)


def open_parquet_input(
    source: Path, *, split: str | None, feature_width: int | None, description: dict[str, Any]
) -> Input:
    """The rows of a folder of <split>.parquet files, or of one file with a column `split` or one `split` for all.

    Args:
        source: folder or file.
        split: the split of a single file without that column.
        feature_width: D; None: the width of the train file, or of the first one.
        description: what the manifest says about the origin; the files' sha256 are added.

    Raises:
        DataError: where a file is missing, corrupt or lacks a column, or two files name different encoders.
    """
    files = _find_files(source, split)
    is_half, num_rows = True, 0
    encoders: set[EncoderInfo | None] = set()
    for path, name in files:
        with _open_parquet(path, name) as file:
            is_half &= pa.types.is_float16(file.schema_arrow.field("features").type.value_type)
            num_rows += file.metadata.num_rows
            encoders.add(encoder_in_metadata(file.schema_arrow.metadata, str(path)))
    known = sorted(str(encoder) for encoder in encoders - {None})
    if len(known) > 1:
        raise DataError(f"{source} holds features of {len(known)} encoders ({'; '.join(known)}): ingest each by itself")
    reference = next((item for item in files if item[1] == "train"), files[0])

    def batches() -> Iterator[RowBatch]:
        for path, name in files:
            yield from _read_batches(path, name)

    return Input(
        description={**description, "files": {path.name: sha256_of_file(path) for path, _ in files}},
        data="real",
        feature_width=feature_width or _width_of(*reference),
        feature_dtype="float16" if is_half else "float32",
        num_rows=num_rows,
        batches=batches,
        encoder=encoders.pop() if len(encoders) == 1 else None,
    )


def generated_input(labels: tuple[str, ...], *, feature_width: int = 768, seed: int = 0) -> Input:
    """Seeded Gaussian clusters, one per label: a stand-in where neither the network nor a mirror answers.

    The same arguments give the same rows on every machine. Nothing learnt from them says anything about emotions.
    """

    def batches() -> Iterator[RowBatch]:
        centres = np.random.default_rng([seed, 0]).standard_normal((len(labels), feature_width)) * GENERATED_SPREAD
        for split_number, (split, rows) in enumerate(GENERATED_ROWS.items()):
            for position, label in enumerate(labels):
                noise = np.random.default_rng([seed, 1, split_number, position]).standard_normal((rows, feature_width))
                values = pa.array((centres[position] + noise).astype(np.float16).ravel())
                yield RowBatch(
                    file=f"generated {split}",
                    start=position * rows,
                    splits=pa.repeat(pa.scalar(split), rows),
                    ids=pa.array([f"{label}/{split}-{number}" for number in range(rows)]),
                    labels=pa.repeat(pa.scalar(label), rows),
                    features=pa.FixedSizeListArray.from_arrays(values, feature_width),
                )

    return Input(
        description={"kind": "generated", "name": "Gaussian clusters", "seed": seed},
        data="generated",
        feature_width=feature_width,
        feature_dtype="float16",
        num_rows=len(labels) * sum(GENERATED_ROWS.values()),
        batches=batches,
    )
