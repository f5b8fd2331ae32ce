"""Rows of features: Parquet files or seeded noise, staged in S3 in chunks, checked and cut into shards by tasks.

N rows of a batch, D feature width.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.assets.catalogue import asset_names, find_asset, get_asset, read_provenance
from orchestration.data.decisions import FACT_SCHEMA
from orchestration.data.ingest_rules import SPLIT_NAME, Reason
from orchestration.data.manifest import Advance, id_hash, parquet_bytes
from orchestration.data.staging import Staged, places_by_chunk
from orchestration.services import storage
from tinyemo.encoders import EncoderInfo, encoder_in_metadata
from tinyemo.errors import DataError, first_line
from tinyemo.local_files import sha256_of_file
from tinyemo.taxonomies import Taxonomy

BATCH_ROWS = 1024
READ_BUFFER_BYTES = 1 << 20
CHUNK_BYTES = 16 * 2**20
"""A staged chunk ends with the batch that reaches this."""
STAGED_GROUP_ROWS = 256
"""Rows of a chunk that a shard's task can read by themselves."""
VECTOR_HASH_BYTES = 16
"""Vectors are compared and digested by their blake2b of this length."""

GENERATED_ROWS = {"train": 200, "test": 50}
"""Rows per label of the generated data set."""
GENERATED_SPREAD = 0.06
"""Distance of a generated cluster's centre from the origin, per dimension, in units of the noise."""

FeatureDtype = Literal["float16", "float32"]
WORDS = ("split", "id", "label")


@dataclass(frozen=True)
class FeatureInput:
    """A data set of features before its rows are checked; stays on the driver."""

    description: dict[str, Any]
    """The manifest's `source`."""
    data: Literal["real", "generated"]
    feature_width: int
    feature_dtype: FeatureDtype
    num_rows: int
    batches: Callable[[], Iterator[pa.Table]]
    """Tables of N rows with the columns number (row of its file, from 1), file, split, id, label and features."""
    encoder: EncoderInfo | None = None
    """Network that made the features; None where nothing says so."""


def open_features(source: str, *, split: str | None, feature_width: int | None) -> FeatureInput:
    """Open a folder of <split>.parquet files, one Parquet file, or an asset by its name.

    Args:
        source: folder, file or asset.
        split: the split of a single file without a column `split`.
        feature_width: D; None takes the width of the train file, or of the first one.

    Raises:
        DataError: a file is missing, corrupt or lacks a column, or two files name different encoders.
    """
    path, description, encoder = Path(source), {"kind": "file", "name": Path(source).name}, None
    if path.is_dir():
        description["kind"] = "folder"
    elif not path.exists():
        if source not in asset_names():
            raise DataError(f"{source} is neither a file, a folder nor an asset: assets are {', '.join(asset_names())}")
        path, encoder = get_asset(source), find_asset(source).encoder
        description = {"kind": "asset", "name": source, **read_provenance(path)}
    files = _find_files(path, split)
    is_half, num_rows = True, 0
    encoders: set[EncoderInfo | None] = set()
    for file_path, name in files:
        with _open_parquet(file_path, name) as file:
            is_half &= pa.types.is_float16(file.schema_arrow.field("features").type.value_type)
            num_rows += file.metadata.num_rows
            encoders.add(encoder_in_metadata(file.schema_arrow.metadata, str(file_path)))
    known = sorted(str(item) for item in encoders - {None})
    if len(known) > 1:
        raise DataError(f"{source} holds features of {len(known)} encoders ({'; '.join(known)}): ingest each by itself")
    reference = next((item for item in files if item[1] == "train"), files[0])
    return FeatureInput(
        description={**description, "files": {path.name: sha256_of_file(path) for path, _ in files}},
        data="real",
        feature_width=feature_width or _width_of(*reference),
        feature_dtype="float16" if is_half else "float32",
        num_rows=num_rows,
        batches=lambda: (batch for item in files for batch in _read_batches(*item)),
        encoder=encoder or (encoders.pop() if len(encoders) == 1 else None),
    )


def generated_features(labels: tuple[str, ...], *, feature_width: int = 768, seed: int = 0) -> FeatureInput:
    """Return seeded Gaussian clusters, one per label: a stand-in where neither the network nor a mirror answers.

    The same arguments give the same rows on every machine. Nothing learnt from them says anything about emotions.
    """

    def batches() -> Iterator[pa.Table]:
        centres = np.random.default_rng([seed, 0]).standard_normal((len(labels), feature_width)) * GENERATED_SPREAD
        for split_number, (split, rows) in enumerate(GENERATED_ROWS.items()):
            for position, label in enumerate(labels):
                noise = np.random.default_rng([seed, 1, split_number, position]).standard_normal((rows, feature_width))
                values = pa.array((centres[position] + noise).astype(np.float16).ravel())
                ids = pa.array([f"{label}/{split}-{number}" for number in range(rows)])
                words = (pa.repeat(pa.scalar(split), rows), ids, pa.repeat(pa.scalar(label), rows))
                features = pa.FixedSizeListArray.from_arrays(values, feature_width)
                yield _batch(f"generated {split}", position * rows, words, features)

    return FeatureInput(
        description={"kind": "generated", "name": "Gaussian clusters", "seed": seed},
        data="generated",
        feature_width=feature_width,
        feature_dtype="float16",
        num_rows=len(labels) * sum(GENERATED_ROWS.values()),
        batches=batches,
    )


def _batch(file: str, start: int, words: tuple[pa.Array, ...], features: pa.Array) -> pa.Table:
    numbers = pa.array(np.arange(start + 1, start + 1 + len(features)))
    files = pa.repeat(pa.scalar(file), len(features))
    return pa.table([numbers, files, *words, features], names=["number", "file", *WORDS, "features"])


def _find_files(source: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """Return each Parquet file with its split; None where a column `split` says it row by row."""
    if not source.is_dir():
        return [(source, split)]
    if split is not None:
        raise DataError(f"--split {split} goes with a single file, {source} is a folder of <split>.parquet files")
    files = sorted(source.glob("*.parquet"))
    if not files:
        raise DataError(f"{source} holds no <split>.parquet file")
    return [(path, path.stem) for path in files]


def _open_parquet(path: Path, split: str | None) -> pq.ParquetFile:
    try:
        # Buffered: otherwise the whole column of a row group comes into memory at once.
        file = pq.ParquetFile(path, buffer_size=READ_BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file ({first_line(error)}): write it again") from error
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


def _read_batches(path: Path, split: str | None) -> Iterator[pa.Table]:
    with _open_parquet(path, split) as file:
        names = file.schema_arrow.names
        label = "emotion" if "emotion" in names else "label"
        columns = ["id", label, "features", *([] if split else ["split"])]
        start = 0
        try:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                splits = pa.repeat(pa.scalar(split), len(batch)) if split else pc.cast(batch["split"], pa.string())
                ids, labels = (pc.cast(batch[name], pa.string()) for name in ("id", label))
                yield _batch(path.name, start, (splits, ids, labels), batch["features"])
                start += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is corrupt after row {start} ({first_line(error)}): write it again") from error


def _width_of(path: Path, split: str | None) -> int:
    """Return the fixed width of the features, or the most common one of the first batch."""
    with _open_parquet(path, split) as file:
        kind = file.schema_arrow.field("features").type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    first = next(_read_batches(path, split))["features"]
    lengths: Counter[int | None] = Counter(pc.list_value_length(first).to_pylist())
    lengths.pop(None, None)
    lengths.pop(0, None)
    if not lengths:
        raise DataError(f"{path}: the first {BATCH_ROWS} rows have no features")
    return int(lengths.most_common(1)[0][0] or 0)


def stage_features(rows: FeatureInput, uri: str, advance: Advance) -> Staged:
    """Write the rows in chunks under `uri`, each sorted by split and id hash; one chunk is in memory at a time.

    A shard holds a range of id hashes of a split, so its task finds its rows in few row groups of each chunk.
    """
    starts = [0]
    batches: list[pa.Table] = []

    def put() -> None:
        table = pa.concat_tables(batches).combine_chunks()
        hashes = pa.array([id_hash(sample_id or "") for sample_id in table["id"].to_pylist()], pa.uint64())
        order = pc.sort_indices(
            table.drop_columns(["features"]).append_column("hash", hashes),
            [("split", "ascending"), ("hash", "ascending"), ("file", "ascending"), ("number", "ascending")],
        )
        data = parquet_bytes(table.take(order), STAGED_GROUP_ROWS)
        storage.write_bytes(f"{uri}/{len(starts) - 1:06d}.parquet", data)
        starts.append(starts[-1] + table.num_rows)
        batches.clear()
        advance("read", starts[-1], rows.num_rows)

    for batch in rows.batches():
        if batches and batch.schema != batches[0].schema:
            put()
        batches.append(batch)
        if sum(batch.nbytes for batch in batches) >= CHUNK_BYTES:
            put()
    if batches:
        put()
    return Staged(uri, tuple(starts), "", 0)


@dataclass(frozen=True)
class FeatureSource:
    """Staged rows, and what they are checked against; travels to the tasks."""

    staged: Staged
    taxonomy: Taxonomy
    feature_width: int
    feature_dtype: FeatureDtype

    @property
    def schema(self) -> pa.Schema:
        """Columns of a shard."""
        features = pa.list_(pa.type_for_alias(self.feature_dtype), self.feature_width)
        return pa.schema([("id", pa.string()), ("label", pa.string()), ("features", features)])

    def check(self, chunk: int) -> pa.Table:
        """Return FACT_SCHEMA, a row for each row of a chunk."""
        table = pq.read_table(io.BytesIO(storage.read_bytes(self._uri(chunk)))).combine_chunks()
        reasons: dict[int, tuple[Reason, str]] = {}
        for name in WORDS:
            is_empty = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(table[name]), ""), True)
            _note(reasons, np.flatnonzero(is_empty), Reason.NULL_FIELD, f"{name} is null or empty")
        column = pa.concat_arrays(table["features"].chunks)
        _note(reasons, np.flatnonzero(column.is_null()), Reason.NULL_FIELD, "features is null")
        features, rows = self._read_features(column, reasons)
        words, splits = table["label"].to_pylist(), table["split"].to_pylist()
        labels = {word: self.taxonomy.label(word) for word in set(words) - {None}}
        for row, (word, split) in enumerate(zip(words, splits, strict=True)):
            if word is not None and labels[word] is None:
                detail = f"{word!r} is not a label of {self.taxonomy.name}"
                _note(reasons, [row], Reason.UNKNOWN_LABEL, detail)
            if split is not None and not SPLIT_NAME.fullmatch(split):
                detail = f"split is {split!r}: use letters, digits, underscores, dots and dashes"
                _note(reasons, [row], Reason.BAD_SPLIT, detail)
        hashes: list[bytes | None] = [None] * table.num_rows
        for row, vector in zip(rows.tolist(), features + features.dtype.type(0), strict=True):  # -0 is 0
            if row not in reasons:
                hashes[row] = hashlib.blake2b(vector.data, digest_size=VECTOR_HASH_BYTES).digest()
        found = [reasons.get(row) for row in range(table.num_rows)]
        facts = {
            "number": table["number"],
            "id": table["id"],
            "split": table["split"],
            "reason": pa.array([None if item is None else str(item[0]) for item in found], pa.string()),
            "detail": pa.array([None if item is None else item[1] for item in found], pa.string()),
            "content": pa.array(hashes, pa.binary(VECTOR_HASH_BYTES)),
            "label": pa.array(
                [word if row in reasons else labels[word] for row, word in enumerate(words)], pa.string()
            ),
            "text_bytes": pa.repeat(pa.scalar(0, pa.int64()), table.num_rows),
            "image_bytes": pa.repeat(pa.scalar(features.itemsize * self.feature_width, pa.int64()), table.num_rows),
        }
        columns = [facts.get(field.name, pa.nulls(table.num_rows, field.type)) for field in FACT_SCHEMA]
        return pa.table(columns, schema=FACT_SCHEMA)

    def _read_features(
        self, column: pa.Array, reasons: dict[int, tuple[Reason, str]]
    ) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
        """Return (M, D) features of the right width and their rows (M,); note the reasons of all others."""
        lengths = pc.fill_null(pc.list_value_length(column), self.feature_width).to_numpy(zero_copy_only=False)
        for row in np.flatnonzero(lengths != self.feature_width).tolist():
            detail = f"features has {lengths[row]} numbers instead of {self.feature_width}"
            _note(reasons, [row], Reason.WRONG_WIDTH, detail)
        is_right = (lengths == self.feature_width) & ~column.is_null().to_numpy(zero_copy_only=False)
        rows = np.flatnonzero(is_right)
        values = column.take(pa.array(rows)).flatten()
        has_null = values.is_null().to_numpy(zero_copy_only=False).reshape(-1, self.feature_width).any(axis=1)
        _note(reasons, rows[has_null], Reason.NULL_FIELD, "features holds a null")
        with np.errstate(over="ignore", invalid="ignore"):
            matrix = values.to_numpy(zero_copy_only=False).reshape(-1, self.feature_width).astype(self.feature_dtype)
        num_bad = (~np.isfinite(matrix)).sum(axis=1)
        for row, count in zip(rows[num_bad > 0].tolist(), num_bad[num_bad > 0], strict=True):
            _note(reasons, [row], Reason.NOT_FINITE, f"features holds {count} NaN or Inf as {self.feature_dtype}")
        return matrix, rows

    def tables(self, positions: NDArray[np.int64]) -> pa.Table:
        """Return the rows at `positions` of the staged input, in that order, with the columns of a shard."""
        ids: list[str] = []
        labels: list[str | None] = []
        parts = []
        for chunk, places in places_by_chunk(self.staged, np.sort(positions)):
            groups = np.unique(places // STAGED_GROUP_ROWS)
            with pq.ParquetFile(storage.filesystem().open_input_file(self._uri(chunk).removeprefix("s3://"))) as file:
                table = file.read_row_groups(groups.tolist(), columns=["id", "label", "features"])
            group = np.searchsorted(groups, places // STAGED_GROUP_ROWS)
            place = group * STAGED_GROUP_ROWS + places % STAGED_GROUP_ROWS
            table = table.take(pa.array(place)).combine_chunks()
            ids += table["id"].to_pylist()
            labels += [self.taxonomy.label(word) for word in table["label"].to_pylist()]
            parts.append(self._read_features(pa.concat_arrays(table["features"].chunks), {})[0])
        values = pa.array(np.concatenate(parts).ravel())
        features = pa.FixedSizeListArray.from_arrays(values, self.feature_width)
        found = pa.table([ids, labels, features], schema=self.schema)
        return found.take(pa.array(np.argsort(np.argsort(positions))))

    def originals(self, positions: NDArray[np.int64]) -> tuple[list[str], list[str | None]]:
        """Return the file of each row at the ascending `positions`, and no text: features have none."""
        files: list[str] = []
        for chunk, places in places_by_chunk(self.staged, positions):
            data = io.BytesIO(storage.read_bytes(self._uri(chunk)))
            files += pq.read_table(data, columns=["file"])["file"].take(pa.array(places)).to_pylist()
        return files, [None] * len(files)

    def _uri(self, chunk: int) -> str:
        return f"{self.staged.uri}/{chunk:06d}.parquet"


def _note(
    reasons: dict[int, tuple[Reason, str]], rows: NDArray[np.int64] | list[int], reason: Reason, detail: str
) -> None:
    for row in rows:
        reasons.setdefault(int(row), (reason, detail))
