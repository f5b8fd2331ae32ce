"""One version of a data set in S3: a JSON manifest that names everything else, and an index that runs are planned from.

<root>/<name>/latest.json                      {"version": ..., "digest": ...}, written last
<root>/<name>/<version>/manifest.json          written after everything that it names
<root>/<name>/<version>/index.parquet          INDEX_SCHEMA, one line per record in storage order
<root>/<name>/<version>/rejected.parquet       REJECTED_SCHEMA, every record that was not kept, with its reason
<root>/<name>/<version>/<split>-00000.parquet  records: FEATURE columns, IMAGE_SCHEMA or RECORD_SCHEMA, by `kind`
<root>/<name>/<version>/patches-<split>-00000.parquet  beside features of an encoder: id, patches (P x D float16)
<root>/<name>/<version>/card.md                for images and instruct: a description for people

A version is named by its digest, so a new version never touches the files of another one, and a reader of `latest.json`
sees the old version until the new one is whole.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, field_serializer

from orchestration.services import storage
from tinyemo.encoders import EncoderInfo
from tinyemo.errors import ConfigError, DataError
from tinyemo.taxonomies import Taxonomy, TaxonomyChoice

logger = logging.getLogger(__name__)

VERSION_LENGTH = 12
"""A version is named by this many hexadecimal digits of its digest."""

Kind = Literal["features", "images", "instruct"]
Advance = Callable[[str, int, int], None]
"""Progress callback: (stage, units done, units in all)."""

INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("label", pa.string()),  # null where the record has none
        ("id_hash", pa.uint64()),
        ("image_hash", pa.uint64()),  # first 8 bytes of the image's sha256, big endian; null for features
        ("shard", pa.int32()),  # place in the manifest's list of shards
        ("row", pa.int32()),  # row in that shard
    ]
)
IMAGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # the encoded file, as it came
        ("image_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("label", pa.string()),
        ("source", pa.string()),
    ]
)
"""Columns of a labelled image."""
RECORD_SCHEMA = pa.schema(
    [
        *(IMAGE_SCHEMA.field(name) for name in ("id", "image", "image_sha256", "width", "height")),
        ("task", pa.string()),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),  # human, gpt, human, gpt ...
        ("labels_offered", pa.list_(pa.string())),
        ("label_stated", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
    ]
)
"""Columns of an instruct record; `label_stated`, `label` may be null, `labels_offered` empty."""
REJECTED_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # line of a file of records, element of an array or row of a table, from 1
        ("file", pa.string()),  # name of the input file
        ("split", pa.string()),
        ("id", pa.string()),
        ("label", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("record", pa.string()),  # as it came, bytes that are not UTF-8 as \xff; null for features
    ]
)
_INCOMPRESSIBLE = ("image", "features", "patches")
_REPEATED = ("split", "label", "label_stated", "task", "source", "file", "reason", "turns.list.element.role")
_HELD_OUT_ORDER = {"test": 0, "val": 1, "validation": 1, "dev": 1, "train": 3}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SplitCounts(_Part):
    """Number of records of one split."""

    rows: NonNegativeInt
    labels: dict[str, int]
    """Canonical label -> rows."""


class FileRef(_Part):
    """One file of a version."""

    path: str
    """Relative to the version's folder."""
    num_bytes: NonNegativeInt
    sha256: str


class Shard(FileRef):
    """One Parquet file of records."""

    split: str
    rows: PositiveInt


class Rejected(FileRef):
    """The records that the ingest did not keep."""

    rows: NonNegativeInt
    reasons: dict[str, int]
    """Reason code -> rows."""

    @property
    def num_duplicates(self) -> int:
        """Sound records that are one too many."""
        return sum(rows for reason, rows in self.reasons.items() if reason.startswith("duplicate_"))


class Manifest(_Part):
    """One version of a data set; everything that it names is in S3 before it is."""

    format: Literal[2] = 2
    """Layout of manifest, index and shards; 1 had label ids in place of words."""
    kind: Kind
    name: str
    version: str
    """The first VERSION_LENGTH digits of `digest`."""
    digest: str
    """sha256 over layout, kept records and rejected records; independent of file names, source and time. Features have
    an order of their own, whatever that of the input; images and instruct records keep the input's, so it counts."""
    created_at: str
    """UTC, ISO 8601."""
    data: Literal["real", "generated"]
    source: dict[str, Any]
    """Origin of the records: kind, name, files with sha256, and for an asset the source that answered."""
    taxonomy: TaxonomyChoice
    """Taxonomy that the labels belong to."""
    rules: dict[str, Any] = {}
    """Rules by which records were checked, and by which answers were made where a program wrote them."""
    rows_in: NonNegativeInt
    """Records read; equal to those kept and those rejected."""
    rows_per_group: PositiveInt
    """Rows of a Parquet row group, the unit of reading; the last one of a shard may be shorter."""
    splits: dict[str, SplitCounts]
    shards: list[Shard]
    index: FileRef
    rejected: Rejected
    tasks: dict[str, dict[str, int]] = {}
    """Kind instruct: split -> task (caption, vqa, sqa, reasoning) -> records."""
    card: FileRef | None = None
    """Markdown for people; kinds images and instruct."""
    feature_width: PositiveInt | None = None
    """Kind features: D."""
    feature_dtype: Literal["float16", "float32"] = "float16"
    encoder: EncoderInfo | None = None
    """Encoder that made the features; None where that is not known."""
    patch_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of an image's patches, P in all; None where only pooled features are stored."""
    patch_width: PositiveInt | None = None
    """D of a patch."""
    patches: list[Shard] = []
    """Patch features: columns id (sha256 of the image) and patches (P x D float16, row after row of the grid); also
    of images that have no pooled row because they have no label."""
    uri: str = Field(exclude=True)
    """Address of the version's folder; known from where the manifest was read, never stored."""

    @field_serializer("taxonomy")
    def _with_words(self, taxonomy: Taxonomy) -> dict[str, Any]:
        """Store the words themselves, so that a data set carries its labels."""
        return taxonomy.model_dump(mode="json")

    @property
    def labels(self) -> tuple[str, ...]:
        """Words of the taxonomy."""
        return self.taxonomy.words

    @property
    def rows_kept(self) -> int:
        """Records over all splits."""
        return sum(split.rows for split in self.splits.values())

    def file_uri(self, path: str) -> str:
        """Return the address of one of the version's files."""
        return f"{self.uri}/{path}"

    def shards_of(self, split: str) -> list[Shard]:
        """Return the shards of a split, in order.

        Raises:
            DataError: the split is not in this data set.
        """
        if split not in self.splits:
            raise DataError(f"{self.uri} has no split {split!r}: it has {', '.join(sorted(self.splits))}")
        return [shard for shard in self.shards if shard.split == split]

    def shard_uris(self, split: str) -> list[str]:
        """Return the addresses of a split's shards, in order; DataError where there is no such split."""
        return [self.file_uri(shard.path) for shard in self.shards_of(split)]

    def files(self) -> Iterable[FileRef]:
        """Return every file that the version needs besides the manifest itself."""
        return [*self.shards, self.index, self.rejected, *self.patches, *([self.card] if self.card else [])]


def id_hash(sample_id: str) -> int:
    """Return the 64-bit number that orders and splits rows: blake2b of the id, 8 bytes, big endian."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big")


def held_out_rank(split: str) -> tuple[int, str]:
    """Return the sort key of a split: of several splits that hold a record, the first one keeps it."""
    return _HELD_OUT_ORDER.get(split, 2), split


@dataclass(frozen=True)
class Rejection:
    """One image or row that is not kept; `row` is its place in its split, from 0."""

    split: str | None
    id: str | None
    label: str | None
    row: int
    reason: StrEnum
    detail: str


def rejected_table(rejections: list[Rejection]) -> pa.Table:
    """Return REJECTED_SCHEMA, one line for each rejection."""
    rows = [vars(item) | {"number": item.row + 1, "reason": str(item.reason)} for item in rejections]
    return pa.Table.from_pylist(rows, REJECTED_SCHEMA)


# Reading a version

_HOW_TO_MAKE = {
    "features": "`tinyemo ingest features` or `tinyemo features`",
    "images": "`tinyemo ingest images`",
    "instruct": "`tinyemo ingest instruct` or `tinyemo ingest oasis`",
}


def load_manifest(uri: str, *kinds: Kind) -> Manifest:
    """Return the manifest of a data set (`s3://bucket/datasets/emotion6`: the latest) or of one version of it.

    Args:
        uri: address of the data set, or of a version's folder.
        kinds: the kinds of data that the caller can use; none for any.

    Raises:
        DataError: there is no data set, no valid manifest, or data of another kind.
        StorageError: S3 cannot be read.
    """
    root = uri.rstrip("/")
    try:
        try:
            latest = storage.read_json(f"{root}/latest.json")
        except storage.MissingObjectError:
            document = storage.read_json(f"{root}/manifest.json")
        else:
            if not isinstance(latest, dict) or not isinstance(latest.get("version"), str):
                raise DataError(f"{root}/latest.json names no version: ingest the data set again")
            root = f"{root}/{latest['version']}"
            document = storage.read_json(f"{root}/manifest.json")
    except storage.MissingObjectError as error:
        raise DataError(
            f"no data set at {uri}: put one there with {_how_to_make(kinds)}, or see `tinyemo ingest --help`"
        ) from error
    return parse_manifest(document, root, *kinds)


def _how_to_make(kinds: Iterable[Kind]) -> str:
    return " or ".join(_HOW_TO_MAKE[kind] for kind in kinds or _HOW_TO_MAKE)


def parse_manifest(document: Any, uri: str, *kinds: Kind) -> Manifest:
    """Return the manifest in a JSON document that was read from the version's folder `uri`.

    Raises:
        DataError: naming the first field that is wrong.
    """
    if not isinstance(document, dict):
        raise DataError(f"{uri}/manifest.json is not a manifest: ingest the data set again")
    try:
        manifest = Manifest.model_validate({**document, "uri": uri})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{uri}/manifest.json: field {field}: {first['msg']}; {error.error_count()} field(s) are wrong"
        ) from error
    if kinds and manifest.kind not in kinds:
        raise DataError(
            f"{uri} holds {manifest.kind}; this needs {' or '.join(kinds)}, made with {_how_to_make(kinds)}"
        )
    return manifest


def read_file(manifest: Manifest, file: FileRef) -> bytes:
    """Return the bytes of one file of the version, checked against the manifest's sha256.

    Raises:
        DataError: the file is missing, or its bytes are not the ones that were ingested.
        StorageError: S3 cannot be read.
    """
    uri = manifest.file_uri(file.path)
    try:
        data = storage.read_bytes(uri)
    except storage.MissingObjectError as error:
        raise DataError(f"{uri} is missing, the manifest names it: ingest the data set again with --force") from error
    digest = hashlib.sha256(data).hexdigest()
    if digest != file.sha256:
        raise DataError(
            f"{uri} is corrupt: {len(data)} bytes with sha256 {digest[:12]}, the manifest says "
            f"{file.num_bytes} bytes with {file.sha256[:12]}; ingest the data set again with --force"
        )
    return data


def read_index(manifest: Manifest) -> pa.Table:
    """Return one line per record with the columns of INDEX_SCHEMA, checked against the manifest's sha256.

    Raises:
        DataError: the index is corrupt or counts other rows than the manifest.
    """
    table = pq.read_table(io.BytesIO(read_file(manifest, manifest.index)))
    if table.schema != INDEX_SCHEMA or table.num_rows != manifest.rows_kept:
        uri = manifest.file_uri(manifest.index.path)
        raise DataError(f"{uri} is not the index of its manifest: ingest the data set again with --force")
    return table


def missing_files(manifest: Manifest) -> list[str]:
    """Return the paths that are absent from S3 or have another size; one listing, no reads."""
    stored = storage.list_prefix(manifest.uri)
    return [file.path for file in manifest.files() if stored.get(manifest.file_uri(file.path)) != file.num_bytes]


def verify_manifest(manifest: Manifest) -> int:
    """Read every file of the version, compare its sha256, and return the number of bytes read.

    Raises:
        DataError: naming the first file, in the manifest's order, that is missing or corrupt.
    """
    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        return sum(pool.map(lambda file: len(read_file(manifest, file)), manifest.files()))


# Writing a version


def check_destination(name: str, root: str) -> None:
    """Fail before the long part where the name, the bucket or the credentials are wrong.

    Raises:
        ConfigError: the name cannot stand in an address.
        StorageError: `root` is no S3 address, or S3 refuses.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name):
        raise ConfigError(f"name is {name!r}: use lower-case letters, digits, dots, dashes")
    bucket, _ = storage.parse_s3_uri(root)
    storage.exists(f"s3://{bucket}/.tinyemo-probe")


def existing_version(uri: str, digest: str) -> Manifest | None:
    """Return the version's manifest where it is whole; None where it has to be built."""
    try:
        manifest = parse_manifest(storage.read_json(f"{uri}/manifest.json"), uri)
    except storage.MissingObjectError:
        return None
    missing = missing_files(manifest)
    if manifest.digest != digest or missing:
        logger.warning("%s lacks %s: storing it again", uri, ", ".join(missing) or "its digest")
        return None
    return manifest


def publish(manifest: Manifest) -> None:
    """Write the manifest, whose files are all in S3, and point latest.json at it."""
    storage.write_json(f"{manifest.uri}/manifest.json", manifest.model_dump(mode="json"))
    point_latest_at(manifest)


def point_latest_at(manifest: Manifest) -> None:
    """Make this the version that the data set's plain address leads to."""
    uri = f"{manifest.uri.rsplit('/', 1)[0]}/latest.json"
    pointer = {"version": manifest.version, "digest": manifest.digest}
    try:
        if storage.read_json(uri) == pointer:
            return
    except storage.MissingObjectError:
        logger.debug("%s is new", uri)
    storage.write_json(uri, pointer)


def put_file(uri: str, path: str, data: bytes) -> FileRef:
    """Store one file of the version at `uri`."""
    storage.write_bytes(f"{uri}/{path}", data)
    return FileRef(path=path, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def put_index(uri: str, kept: pa.Table, rows_of_shards: list[int]) -> FileRef:
    """Store the index of a version.

    Args:
        uri: the version's folder.
        kept: split, label, id and, for data with images, image_sha256 (binary) of every record in storage order.
        rows_of_shards: number of rows of each shard.
    """
    hashes: list[int | None] = [None] * kept.num_rows
    if "image_sha256" in kept.column_names:
        hashes = [None if sha is None else int.from_bytes(sha[:8], "big") for sha in kept["image_sha256"].to_pylist()]
    columns = [
        kept["split"],
        kept["label"],
        pa.array([id_hash(sample_id) for sample_id in kept["id"].to_pylist()], pa.uint64()),
        pa.array(hashes, pa.uint64()),
        pa.array(np.repeat(np.arange(len(rows_of_shards)), rows_of_shards), pa.int32()),
        pa.array(np.concatenate([np.arange(0), *map(np.arange, rows_of_shards)]), pa.int32()),
    ]
    return put_file(uri, "index.parquet", parquet_bytes(pa.table(columns, schema=INDEX_SCHEMA)))


def put_rejected(uri: str, rejected: pa.Table) -> Rejected:
    """Store the records that were not kept, with the columns of REJECTED_SCHEMA."""
    file = put_file(uri, "rejected.parquet", parquet_bytes(rejected.cast(REJECTED_SCHEMA)))
    return Rejected(**file.model_dump(), rows=rejected.num_rows, reasons=count_values(rejected["reason"]))


def parquet_bytes(table: pa.Table, rows_per_group: int | None = None) -> bytes:
    """Return a Parquet file of one row group, or of groups of `rows_per_group` rows; see `parquet_options`."""
    buffer = io.BytesIO()
    pq.write_table(
        table, buffer, row_group_size=rows_per_group or max(1, table.num_rows), **parquet_options(table.schema)
    )
    return buffer.getvalue()


def parquet_options(schema: pa.Schema) -> dict[str, Any]:
    """Return how columns are stored: with page checksums; images and features, which do not shrink, uncompressed."""
    empty = io.BytesIO()
    pq.write_table(schema.empty_table(), empty)
    columns = pq.ParquetFile(empty).schema
    paths = [columns.column(place).path for place in range(len(columns))]
    return {
        "compression": {path: "none" if path.split(".")[0] in _INCOMPRESSIBLE else "zstd" for path in paths},
        "use_dictionary": [path for path in paths if path in _REPEATED],
        "write_statistics": False,
        "write_page_checksum": True,
    }


def count_values(column: pa.ChunkedArray) -> dict[str, int]:
    """Return how often each value occurs, by value; nulls are left out."""
    return dict(sorted(Counter(column.drop_null().to_pylist()).items()))


def count_splits(kept: pa.Table) -> dict[str, SplitCounts]:
    """Return the rows and labels of each split from the columns split and label, in the order of their first rows."""
    splits = {}
    for split in pc.unique(kept["split"]).to_pylist():
        labels = kept.filter(pc.equal(kept["split"], split))["label"]
        splits[split] = SplitCounts(rows=len(labels), labels=count_values(labels))
    return splits
