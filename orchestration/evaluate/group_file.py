"""Groups of images from a table of the user's, joined to rows by id, file name or the name without its ending."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.assets.catalogue import get_asset
from orchestration.data.manifest import VERSION_LENGTH, Manifest, load_manifest
from orchestration.services import storage
from tinyemo.errors import ConfigError, DataError

KEYS = ("id", "image")


def read_groups(location: str) -> pa.Table:
    """Return a table of groups: a .csv, .tsv or .parquet file with a column `id` or `image`, all columns as text.

    Args:
        location: a path, `s3://...`, or `asset:NAME/FILE` for a file of an asset of the catalogue.

    Raises:
        AssetError: no source has the asset.
        DataError: the file is missing, no table, or has neither column.
        StorageError: S3 cannot be read.
    """
    if location.startswith("asset:"):
        asset, _, file = location.removeprefix("asset:").partition("/")
        location = str(get_asset(asset) / file)
    try:
        data = storage.read_bytes(location) if location.startswith("s3://") else Path(location).read_bytes()
        if location.lower().endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            table = pa.table({name: table[name].cast(pa.string()) for name in table.column_names})
        else:
            delimiter = "\t" if location.lower().endswith(".tsv") else ","
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8-sig")), delimiter=delimiter))
            table = pa.Table.from_pylist(rows)
    except storage.MissingObjectError as error:
        raise DataError(f"{location} does not exist: name a table of groups") from error
    except (OSError, UnicodeDecodeError, pa.ArrowException, csv.Error) as error:
        raise DataError(f"{location} cannot be read as a table: {' '.join(str(error).split())}") from error
    if not set(KEYS) & set(table.column_names):
        raise DataError(f"{location} needs a column id or image, it has {', '.join(table.column_names) or 'none'}")
    return table


def join_groups(ids: pa.ChunkedArray, names: Mapping[str, Sequence[str]], groups: pa.Table) -> pa.Table:
    """Return the columns of groups for each of N rows, null where a row has none; key columns are left out.

    Args:
        ids: (N,) ids of rows.
        names: further names of a row by its id, see `names_of_images`.
        groups: see `read_groups`; of two rows for the same image the first counts.
    """
    columns = [groups[name].cast(pa.string()).combine_chunks() for name in KEYS if name in groups.column_names]
    places = np.full(len(ids), -1, np.int64)
    for column in columns:
        found = np.asarray(pc.fill_null(pc.index_in(ids.cast(pa.string()), column), -1), np.int64)
        places = np.where(places < 0, found, places)
    if (places < 0).any():
        places = np.where(places < 0, _places_by_form(ids, names, columns), places)
    rows = pa.array(places, mask=places < 0)
    return pa.table(
        {name: groups[name].combine_chunks().take(rows) for name in groups.column_names if name not in KEYS}
    )


def _places_by_form(
    ids: pa.ChunkedArray, names: Mapping[str, Sequence[str]], columns: Sequence[pa.Array]
) -> NDArray[np.int64]:
    """Return (N,) the row of each id by any form of any of its names, -1 where there is none."""
    keys: dict[str, int] = {}
    for column in columns:
        for row, value in enumerate(column.to_pylist()):
            for key in _forms([value] if value else []):
                keys.setdefault(key, row)
    unique = pc.unique(ids).to_pylist()
    found = [next((keys[key] for key in _forms([name, *names.get(name, ())]) if key in keys), -1) for name in unique]
    places: NDArray[np.int64] = np.array(found, np.int64)[np.asarray(pc.index_in(ids, pa.array(unique)))]
    return places


def _forms(names: Iterable[str]) -> list[str]:
    """Return the names themselves, then all parts between slashes, the last one first, with and without ending."""
    exact = list(names)
    parts = [part for name in exact for part in reversed(PurePosixPath(name).parts)]
    stems = [PurePosixPath(part).stem for part in parts]
    return list(dict.fromkeys([*exact, *parts, *stems]))


def source_images(manifest: Manifest | None) -> Manifest | None:
    """Return the data set of images that features were made from; None where it is not there any more.

    `tinyemo features` writes next to its source, so the source lies under the same root.
    """
    if manifest is None or manifest.source.get("kind") not in ("images", "instruct"):
        return None
    root = manifest.uri.rsplit("/", 2)[0]
    try:
        return load_manifest(f"{root}/{manifest.source['name']}/{manifest.source['digest'][:VERSION_LENGTH]}")
    except DataError:
        return None


def names_of_images(images: Manifest) -> dict[str, list[str]]:
    """Return the ids of an image's records by its sha256; of labelled images without an id that is the file's path.

    Raises:
        DataError: a shard is missing or corrupt.
        StorageError: S3 cannot be read.
    """
    names: dict[str, list[str]] = {}
    for shard in images.shards:
        with storage.filesystem().open_input_file(images.file_uri(shard.path).removeprefix("s3://")) as file:
            table = pq.read_table(file, columns=["id", "image_sha256"])
        for sample_id, sha256 in zip(table["id"].to_pylist(), table["image_sha256"].to_pylist(), strict=True):
            names.setdefault(sha256, []).append(sample_id)
    return names


def clusters_of(groups: pa.Table, column: str, source: str) -> NDArray[Any]:
    """Return (N,) the cluster of each row by a column of groups; a row without a group is a cluster of its own.

    Raises:
        ConfigError: there is no such column, or no row has a group.
    """
    if column not in groups.column_names:
        raise ConfigError(f"cluster_by: {source} has no column {column!r}, it has {', '.join(groups.column_names)}")
    values = groups[column]
    if values.null_count == len(values):
        raise DataError(f"{source} names none of the rows: its ids or images must be those of the data set")
    alone = pa.array([f"\0{row}" for row in range(len(values))]) if values.null_count else None
    return np.asarray((pc.coalesce(values, alone) if alone is not None else values).to_pylist())
