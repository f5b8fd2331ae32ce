"""Instruct data sets as a run reads them: row groups of Parquet shards in S3, by range, checked page by page."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.data.manifest import Manifest, Shard, load_manifest
from orchestration.services import storage
from orchestration.streaming.sampling import chunks_of
from orchestration.streaming.table_cache import remember
from tinyemo.errors import DataError

COLUMNS = ["id", "image", "task", "turns"]
READ_THREADS = 4
MAX_GROUP_BYTES = 128 * 2**20  # of a process's cache of row groups
MAX_FOOTER_BYTES = 16 * 2**20


@dataclass(frozen=True)
class RecordSet:
    """One split of one version of a data set; rows are counted over its shards in the manifest's order."""

    manifest: Manifest
    split: str

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        """Of the split."""
        return tuple(shard for shard in self.manifest.shards if shard.split == self.split)

    @cached_property
    def group_rows(self) -> tuple[int, ...]:
        """Rows of each row group, shard after shard."""
        sizes = [chunks_of(shard.rows, self.manifest.rows_per_group) for shard in self.shards]
        return tuple(int(n) for n in np.concatenate(sizes)) if sizes else ()

    @cached_property
    def group_starts(self) -> NDArray[np.int64]:
        """First row of each row group, and behind the last the number of rows."""
        return np.concatenate([[0], np.cumsum(self.group_rows)]).astype(np.int64)

    @cached_property
    def group_places(self) -> list[tuple[int, int]]:
        """(shard, row group in it) of each row group."""
        counts = [-(-shard.rows // self.manifest.rows_per_group) for shard in self.shards]
        return [(shard, group) for shard, count in enumerate(counts) for group in range(count)]


def open_record_set(uri: str, split: str) -> RecordSet:
    """A split of an instruct data set in S3.

    Raises:
        DataError: there is no such data set or split.
        StorageError: S3 cannot be read.
    """
    manifest = load_manifest(uri, "instruct")
    if split not in manifest.splits:
        raise DataError(f"{manifest.uri} has no split {split!r}: it has {', '.join(sorted(manifest.splits))}")
    return RecordSet(manifest, split)


def read_records(record_set: RecordSet, rows: NDArray[np.int64], columns: Sequence[str] = COLUMNS) -> pa.Table:
    """Return columns of `rows`, in their order; each row group that they touch is read once.

    Raises:
        DataError: a shard is corrupt or not the one of the manifest.
        StorageError: S3 cannot be read.
    """
    groups = np.searchsorted(record_set.group_starts, rows, side="right") - 1
    touched = np.unique(groups)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = list(pool.map(lambda group: _read_group(record_set, int(group), tuple(columns)), touched))
    parts, places = [], []
    for group, table in zip(touched, tables, strict=True):
        place = np.flatnonzero(groups == group)
        parts.append(table.take(pa.array(rows[place] - record_set.group_starts[group])))
        places.append(place)
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))


def _read_group(record_set: RecordSet, group: int, columns: tuple[str, ...]) -> pa.Table:
    shard_place, place = record_set.group_places[group]
    shard = record_set.shards[shard_place]
    uri = record_set.manifest.file_uri(shard.path)
    try:
        return _row_group(uri, shard, place, columns)
    except FileNotFoundError as error:
        raise DataError(f"{uri} is missing, the manifest names it: ingest the data set again with --force") from error
    except (pa.ArrowException, OSError) as error:
        raise _described(error, uri) from error


@remember(
    MAX_GROUP_BYTES,
    key=lambda uri, shard, place, columns: (uri, shard.sha256, place, columns),
    num_bytes=lambda table: int(table.nbytes),
)
def _row_group(uri: str, shard: Shard, place: int, columns: tuple[str, ...]) -> pa.Table:
    with pq.ParquetFile(
        storage.filesystem().open_input_file(uri.removeprefix("s3://")),
        metadata=_footer(uri, shard),
        page_checksum_verification=True,
        pre_buffer=True,
    ) as file:
        return file.read_row_group(place, columns=list(columns), use_threads=False)


@remember(
    MAX_FOOTER_BYTES,
    key=lambda uri, shard: (uri, shard.sha256),
    num_bytes=lambda footer: int(footer.serialized_size),
)
def _footer(uri: str, shard: Shard) -> pq.FileMetaData:
    with storage.filesystem().open_input_file(uri.removeprefix("s3://")) as file:
        footer = pq.read_metadata(file)
    if footer.num_rows != shard.rows:
        raise DataError(f"{uri} has {footer.num_rows} rows, its manifest says {shard.rows}")
    return footer


def _described(error: Exception, uri: str) -> Exception:
    """A line of ours: S3's own where it cannot be read at all, else that the file is corrupt."""
    storage.exists(uri)  # raises what is wrong with S3
    reason = str(error).splitlines()[0]
    return DataError(f"{uri} is corrupt ({reason}): ingest the data set again with --force")


def turns_of(table: pa.Table) -> list[list[tuple[str, str]]]:
    """The conversations of records: (role, text) in turn."""
    column: list[list[dict[str, Any]]] = table["turns"].to_pylist()
    return [[(turn["role"], turn["text"]) for turn in turns] for turns in column]
