"""The rows of a data set that a run trains, validates and tests on: chosen from the index, without reading a shard.

N rows of a selection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.data.manifest import Manifest, read_index
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import canonical_word


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
            reason = str(error).splitlines()[0]
            raise DataError(
                f"{uri} is missing or corrupt ({reason}): ingest the data set again with --force"
            ) from error
        if table.num_rows != shard.rows:
            raise DataError(f"{uri} has {table.num_rows} rows, its manifest says {shard.rows}")
        first = starts[shard.split]
        starts[shard.split] += shard.rows
        table = table.append_column("row", pa.array(np.arange(first, first + shard.rows)))
        tables.append(table.append_column("split", pa.repeat(pa.scalar(shard.split), shard.rows)))
    return pa.concat_tables(tables)
