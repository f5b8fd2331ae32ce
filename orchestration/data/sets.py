"""Records of one split of a data set in S3: row groups of Parquet shards, read by range and checked on the way."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from threading import Condition
from typing import Any, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from cachetools import LRUCache, cached
from numpy.typing import NDArray

from orchestration.data.manifest import Kind, Manifest, Shard, load_manifest
from orchestration.data.plan import Ints, PlannedSet, RowGroups
from orchestration.services import storage
from tinyemo.errors import DataError

READ_THREADS = 4
MAX_GROUP_BYTES = 192 * 2**20
"""Most bytes of row groups that a process keeps; Ray reuses a process for many tasks."""
MAX_FOOTER_BYTES = 16 * 2**20

P = ParamSpec("P")
R = TypeVar("R")


def remember(
    max_bytes: int, *, key: Callable[P, Hashable], num_bytes: Callable[[Any], int]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that keeps what a function returned for a key until newer values need its place.

    Threads may call at the same time; of those that ask for the same key, one reads and the others wait for it.

    Args:
        max_bytes: of all values together; a value that is larger is kept too, alone.
        key: of a call's arguments; calls with the same key return the same.
        num_bytes: of a value.
    """
    cache: LRUCache[Hashable, Any] = LRUCache(max_bytes, getsizeof=lambda value: min(num_bytes(value), max_bytes))
    return cached(cache, key=key, condition=Condition())


@dataclass(frozen=True)
class RecordSet:
    """One split of one version of a data set, or a selection of its rows.

    Attributes:
        split: name of the split; empty for the rows of all splits.
        selection: sorted rows of the split, counted over its shards in the manifest's order; None for all of them.
            Wherever else a row is named, it is counted within the selection.
    """

    manifest: Manifest
    split: str
    selection: Ints | None = None

    @cached_property
    def shards(self) -> tuple[Shard, ...]:
        return tuple(shard for shard in self.manifest.shards if self.split in ("", shard.split))

    @cached_property
    def _shard_starts(self) -> Ints:
        return np.cumsum([0, *(shard.rows for shard in self.shards)])

    @cached_property
    def stored_groups(self) -> RowGroups:
        """Row groups as they lie in storage."""
        return RowGroups.of_shards([shard.rows for shard in self.shards], self.manifest.rows_per_group)

    @property
    def num_rows(self) -> int:
        return int(self._shard_starts[-1]) if self.selection is None else len(self.selection)

    @property
    def row_bytes(self) -> float:
        """Mean bytes of a record in storage."""
        return sum(shard.num_bytes for shard in self.shards) / max(1, int(self._shard_starts[-1]))

    def select(self, rows: Ints) -> RecordSet:
        """Return the record set that holds only `rows`, which are sorted."""
        return replace(self, selection=rows if self.selection is None else self.selection[rows])

    def stored_rows(self, rows: Ints) -> Ints:
        """Return the rows of the split that `rows` of the selection are."""
        return rows if self.selection is None else self.selection[rows]

    def row_numbers(self, shards: NDArray[np.int32], rows: NDArray[np.int32]) -> Ints:
        """Return the rows of the split that stand in the manifest's `shards` at `rows`."""
        numbers = [place for place, shard in enumerate(self.manifest.shards) if self.split in ("", shard.split)]
        starts = np.zeros(len(self.manifest.shards), dtype=np.int64)
        starts[numbers] = self._shard_starts[:-1]
        return starts[shards] + rows

    def planned(self, weight: float | None = None) -> PlannedSet:
        """Return what the plan needs to know of this set."""
        groups, stored = self.stored_groups, self.stored_groups
        if self.selection is not None:
            counts = np.bincount(stored.groups_of(self.selection), minlength=1)
            groups = RowGroups.of(counts[counts > 0])
        group_bytes = self.row_bytes * stored.num_rows / max(1, stored.num_groups)
        return PlannedSet(self.manifest.digest, groups, group_bytes, weight)


def open_record_set(uri: str, split: str, *kinds: Kind) -> RecordSet:
    """Open a split of a data set in S3.

    Raises:
        DataError: there is no such data set or split.
        StorageError: S3 cannot be read.
    """
    manifest = load_manifest(uri, *kinds)
    if split not in manifest.splits:
        raise DataError(f"{manifest.uri} has no split {split!r}: it has {', '.join(sorted(manifest.splits))}")
    return RecordSet(manifest, split)


def read_records(record_set: RecordSet, rows: Ints, columns: Sequence[str]) -> pa.Table:
    """Read `columns` of `rows`, in their order; each row group that they touch is fetched once.

    Raises:
        DataError: a shard is corrupt or not the one of the manifest.
        StorageError: S3 cannot be read.
    """
    stored = record_set.stored_rows(np.asarray(rows, dtype=np.int64))
    groups = record_set.stored_groups.groups_of(stored)
    touched = np.unique(groups)
    with ThreadPoolExecutor(READ_THREADS) as pool:
        tables = list(pool.map(lambda group: _read_group(record_set, int(group), tuple(columns)), touched))
    starts = record_set.stored_groups.starts(touched)
    parts, places = [], []
    for group, start, table in zip(touched, starts, tables, strict=True):
        place = np.flatnonzero(groups == group)
        parts.append(table.take(pa.array(stored[place] - start)))
        places.append(place)
    if not parts:
        return _read_group(record_set, 0, tuple(columns)).slice(0, 0)
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(places))))


def _read_group(record_set: RecordSet, group: int, columns: tuple[str, ...]) -> pa.Table:
    start = int(record_set.stored_groups.starts(np.array([group]))[0])
    place = int(np.searchsorted(record_set._shard_starts, start, side="right")) - 1
    shard = record_set.shards[place]
    uri = record_set.manifest.file_uri(shard.path)
    try:
        number = (start - int(record_set._shard_starts[place])) // record_set.manifest.rows_per_group
        return _row_group(uri, shard, number, columns)
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
    storage.exists(uri)  # raises the error of S3 itself where S3 cannot be read at all
    reason = str(error).splitlines()[0]
    return DataError(f"{uri} is corrupt ({reason}): ingest the data set again with --force")


def features_array(table: pa.Table) -> NDArray[Any]:
    """Return the features of a table, (N, d) in their stored type, without a copy where the column is one chunk."""
    column = table["features"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(table), -1 if len(table) else column.type.list_size)


def turns_of(table: pa.Table) -> list[list[tuple[str, str]]]:
    """Return the conversations of records: (role, text) in turn."""
    column: list[list[dict[str, Any]]] = table["turns"].to_pylist()
    return [[(turn["role"], turn["text"]) for turn in turns] for turns in column]
