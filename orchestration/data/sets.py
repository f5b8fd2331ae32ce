"""The rows of a data set that a run reads: chosen from the index, and read by row groups of Parquet shards.

Choosing rows (`select_rows`) reads no shard; reading them (`read_records`) fetches ranges and checks them on the way.
N rows of a selection.
"""

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

from orchestration.data.manifest import Kind, Manifest, Shard, load_manifest, read_index
from orchestration.data.plan import Ints, PlannedSet, RowGroups
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError, first_line
from tinyemo.taxonomies import canonical_word

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
    return DataError(f"{uri} is corrupt ({first_line(error)}): ingest the data set again with --force")


def features_array(table: pa.Table) -> NDArray[Any]:
    """Return the features of a table, (N, d) in their stored type, without a copy where the column is one chunk."""
    column = table["features"].combine_chunks()
    return np.asarray(column.flatten()).reshape(len(table), -1 if len(table) else column.type.list_size)


def turns_of(table: pa.Table) -> list[list[tuple[str, str]]]:
    """Return the conversations of records: (role, text) in turn."""
    column: list[list[dict[str, Any]]] = table["turns"].to_pylist()
    return [[(turn["role"], turn["text"]) for turn in turns] for turns in column]


@dataclass(frozen=True)
class SplitRows:
    """The rows of one split in their stored order.

    Attributes:
        shard: (N,) int32, position in `manifest.shards`.
        row: (N,) int32, row in that shard.
        label: (N,) int64, index into the words that the rows were loaded with.
        id_hash: (N,) uint64.
    """

    shard: NDArray[np.int32]
    row: NDArray[np.int32]
    label: NDArray[np.int64]
    id_hash: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, positions: NDArray[np.int64]) -> SplitRows:
        """Return the rows at `positions`, in that order."""
        return SplitRows(self.shard[positions], self.row[positions], self.label[positions], self.id_hash[positions])


@dataclass(frozen=True)
class Selection:
    """The rows of a run, by what it does with them."""

    train: SplitRows
    """Train split, without left-out labels and without rows that were carved out for validation."""
    validation: SplitRows
    """Rows of `validation_split`, else carved out of train; none where neither is asked for."""
    whole: SplitRows
    """Train and validation together, in storage order: the rows of a refit."""
    test: SplitRows
    words: tuple[str, ...]
    """Labels that are told apart; labels of the rows above are indices into them."""
    left_out: SplitRows | None
    """Train rows of the labels that are left out, labels as indices into `left_out_words`; None without such labels."""
    left_out_words: tuple[str, ...]


def load_splits(manifest: Manifest, words: Sequence[str]) -> dict[str, SplitRows]:
    """Return the rows of each split, labels as indices into `words`; rows without a label are left out.

    Raises:
        DataError: the index is not the one that the manifest names, or holds a label outside `words`.
    """
    table = read_index(manifest)
    table = table.filter(table["label"].is_valid())
    encoded = table["label"].combine_chunks().dictionary_encode()
    found = encoded.dictionary.to_pylist()
    foreign = sorted(set(found) - set(words))
    if foreign:
        raise DataError(
            f"{manifest.uri}: labels {', '.join(foreign)} of the data set ({manifest.taxonomy.name}) are not among the "
            f"words {', '.join(words)}; leave out labels.taxonomy, and the data set's own are taken"
        )
    lookup = np.array([list(words).index(word) for word in found], dtype=np.int64)
    labels = lookup[np.asarray(encoded.indices)] if found else np.array([], dtype=np.int64)
    names = np.asarray(table["split"].to_pylist())
    rows = SplitRows(
        np.asarray(table["shard"]), np.asarray(table["row"]), labels, np.asarray(table["id_hash"]).astype(np.uint64)
    )
    return {name: rows.take(np.flatnonzero(names == name)) for name in sorted(set(names.tolist()))}


def select_rows(
    manifest: Manifest,
    taxonomy: Sequence[str],
    *,
    leave_out: Sequence[str] = (),
    validation_split: str | None = None,
    validation_fraction: float = 0.0,
    validation_fold: int = 0,
) -> Selection:
    """Choose the rows of a run.

    Args:
        manifest: of the data set.
        taxonomy: every label that the data set may hold.
        leave_out: labels whose rows are neither trained on, nor validated nor tested.
        validation_split: split that is validated on; None: carve rows out of train.
        validation_fraction: part of the train rows of each label to carve out, in [0, 1).
        validation_fold: number of that part, see `carve_validation`.

    Raises:
        ConfigError: all that does not fit the data set, one line per field.
        DataError, StorageError: see `load_splits`.
    """
    left_out_words = tuple(dict.fromkeys(canonical_word(word) for word in leave_out))
    words = tuple(word for word in taxonomy if word not in left_out_words)
    problems = []
    if foreign := [word for word in left_out_words if word not in taxonomy]:
        problems.append(f"data.leave_out: {', '.join(foreign)} not among the labels {', '.join(taxonomy)}")
    elif len(words) < 2:
        problems.append(f"data.leave_out: leaves {len(words)} labels to train on; at least 2")
    all_splits = load_splits(manifest, taxonomy)
    needed = {"train": "data.dataset", "test": "data.dataset"}
    if validation_split:
        needed[validation_split] = "data.validation_split"
    for split, field in needed.items():
        if split not in all_splits:
            problems.append(f"{field}: {manifest.uri} has no {split} split, it has {', '.join(all_splits)}")
    if validation_split in ("train", "test"):
        problems.append(f"data.validation_split: {validation_split} is needed for itself; name another split")
    if problems:
        raise ConfigError("\n".join(problems))
    splits = {name: _of_words(all_splits[name], taxonomy, words) for name in needed}
    train = splits["train"]
    if validation_split:
        validation = splits[validation_split]
        whole = SplitRows(*(np.concatenate(pair) for pair in zip(_columns(train), _columns(validation), strict=True)))
    else:
        whole = train
        train, validation = carve_validation(train, fraction=validation_fraction, fold=validation_fold)
    left_out = _of_words(all_splits["train"], taxonomy, left_out_words) if left_out_words else None
    return Selection(train, validation, whole, splits["test"], words, left_out, left_out_words)


def _columns(rows: SplitRows) -> tuple[NDArray[Any], ...]:
    return rows.shard, rows.row, rows.label, rows.id_hash


def _of_words(rows: SplitRows, taxonomy: Sequence[str], words: Sequence[str]) -> SplitRows:
    place = np.array([list(words).index(word) if word in words else -1 for word in taxonomy], dtype=np.int64)
    kept = rows.take(np.flatnonzero(place[rows.label] >= 0))
    return SplitRows(kept.shard, kept.row, place[kept.label], kept.id_hash)


def carve_validation(rows: SplitRows, *, fraction: float, fold: int = 0) -> tuple[SplitRows, SplitRows]:
    """Return (rest, validation): of each label, validation is the `fold`-th `fraction` of its rows by id hash.

    The hash belongs to the id, so a row keeps its side when others come or go nearby, and folds never overlap.
    """
    is_validation = np.zeros(len(rows), dtype=bool)
    for label in np.unique(rows.label):
        members = np.flatnonzero(rows.label == label)
        members = members[np.argsort(rows.id_hash[members], kind="stable")]
        first, last = (round(len(members) * fraction * (fold + k)) for k in (0, 1))
        is_validation[members[first:last]] = True
    return rows.take(np.flatnonzero(~is_validation)), rows.take(np.flatnonzero(is_validation))


def read_image_columns(manifest: Manifest) -> pa.Table:
    """Return split, row (counted over the split's shards), image_sha256 and label of every record, without its image.

    Args:
        manifest: of a data set of kind images or instruct.

    Raises:
        DataError: a shard is missing or corrupt.
        StorageError: S3 cannot be read.
    """
    tables, starts = [], dict.fromkeys(manifest.splits, 0)
    for shard in manifest.shards:
        uri = manifest.file_uri(shard.path)
        try:
            with pq.ParquetFile(
                storage.filesystem().open_input_file(uri.removeprefix("s3://")), page_checksum_verification=True
            ) as file:
                table = file.read(columns=["image_sha256", "label"])
        except (pa.ArrowException, OSError) as error:
            storage.exists(uri)  # raises what is wrong with S3
            raise DataError(
                f"{uri} is missing or corrupt ({first_line(error)}): ingest the data set again with --force"
            ) from error
        if table.num_rows != shard.rows:
            raise DataError(f"{uri} has {table.num_rows} rows, its manifest says {shard.rows}")
        first = starts[shard.split]
        starts[shard.split] += shard.rows
        table = table.append_column("row", pa.array(np.arange(first, first + shard.rows)))
        tables.append(table.append_column("split", pa.repeat(pa.scalar(shard.split), shard.rows)))
    return pa.concat_tables(tables)
