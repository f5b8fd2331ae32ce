"""What a data set in S3 is made of: one JSON manifest per version, and an index that the driver plans from.

<root>/<name>/latest.json                      {"version": ..., "digest": ...}, written last
<root>/<name>/<version>/manifest.json          written after everything that it names
<root>/<name>/<version>/index.parquet          one line per row: split, label_id, id_hash, shard, row
<root>/<name>/<version>/rejected.parquet       every row that was not kept, with its reason
<root>/<name>/<version>/<split>-00000.parquet  the rows: features (id, label, label_id, features; sorted by id hash, or
                                               in the order of the images where an encoder made them) or instruct
                                               records (RECORD_SCHEMA, in the order of the input)
<root>/<name>/<version>/patches-<split>-00000.parquet  beside features of an encoder: id, patches (P x D float16)
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from orchestration.services import storage
from tinyemo.encoders import EncoderInfo
from tinyemo.errors import DataError

logger = logging.getLogger(__name__)

VERSION_LENGTH = 12
"""A version is named by this many hexadecimal digits of its digest."""

INDEX_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("label_id", pa.int32()),
        ("id_hash", pa.uint64()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
    ]
)


RECORD_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # the encoded file, as it came
        ("image_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("task", pa.string()),
        ("turns", pa.list_(pa.struct([("role", pa.string()), ("text", pa.string())]))),  # human, gpt, human, gpt ...
        ("labels_offered", pa.list_(pa.string())),
        ("label_stated", pa.string()),
        ("label", pa.string()),
        ("source", pa.string()),
    ]
)
"""Of an instruct record; `label_stated`, `label` may be null, `labels_offered` empty."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class SplitCounts(_Part):
    """What one split holds."""

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
    """One Parquet file of rows."""

    split: str
    rows: PositiveInt


class Rejected(FileRef):
    """The rows that validation turned away."""

    rows: NonNegativeInt
    reasons: dict[str, int]
    """Reason code -> rows."""


class Manifest(_Part):
    """One version of a data set; everything that it names is in S3 before it is."""

    format: Literal[1] = 1
    kind: str
    name: str
    version: str
    """The first VERSION_LENGTH digits of `digest`."""
    digest: str
    """sha256 over layout, kept rows and rejected rows; independent of file names, source and time. Features come in
    their own order, whatever that of the input; instruct records keep the input's, so there it counts."""
    created_at: str
    """UTC, ISO 8601."""
    data: Literal["real", "generated"]
    source: dict[str, Any]
    """Where the rows came from: kind, name, files with sha256, and for an asset which source answered."""
    taxonomy: str
    rows_in: NonNegativeInt
    """Rows read; equal to rows kept + rows rejected."""
    splits: dict[str, SplitCounts]
    shards: list[Shard]
    index: FileRef
    rejected: Rejected
    uri: str = Field(exclude=True)
    """Address of the version's folder; known from where the manifest was read, never stored."""

    @property
    def rows_kept(self) -> int:
        """Rows over all splits."""
        return sum(split.rows for split in self.splits.values())

    def file_uri(self, path: str) -> str:
        """Address of one of the version's files."""
        return f"{self.uri}/{path}"

    def shard_uris(self, split: str) -> list[str]:
        """Addresses of a split's shards, in order.

        Raises:
            DataError: where the split is not in this data set.
        """
        if split not in self.splits:
            raise DataError(f"{self.uri} has no split {split!r}: it has {', '.join(sorted(self.splits))}")
        return [self.file_uri(shard.path) for shard in self.shards if shard.split == split]

    def files(self) -> Iterable[FileRef]:
        """Every file that the version needs besides the manifest itself."""
        return [*self.shards, self.index, self.rejected]


class FeatureManifest(Manifest):
    """Pooled features of one encoder, a label each: what a projector trains on."""

    kind: Literal["features"] = "features"
    feature_width: PositiveInt
    feature_dtype: Literal["float16", "float32"]
    rows_per_shard: PositiveInt
    encoder: EncoderInfo | None = None
    """None where the rows came without that knowledge."""
    patch_grid: tuple[PositiveInt, PositiveInt] | None = None
    """Rows and columns of an image's patches, P in all; None where only pooled features are here."""
    patch_width: PositiveInt | None = None
    """D."""
    patches: list[Shard] = []
    """Patch features: columns id (sha256 of the image) and patches (P x D float16, row after row of the grid); also
    of images that have no pooled row because they have no label."""

    def files(self) -> Iterable[FileRef]:
        """Every file that the version needs besides the manifest itself."""
        return [*super().files(), *self.patches]


class InstructManifest(Manifest):
    """Images with conversations about them: what a multimodal LLM trains on."""

    kind: Literal["instruct"] = "instruct"
    rows_per_group: PositiveInt
    """Rows of a Parquet row group, the unit of reading; the last one of a shard may be shorter."""
    tasks: dict[str, dict[str, int]]
    """Split -> task (caption, vqa, sqa, reasoning) -> records."""
    rules: dict[str, Any]
    """By which records were checked, and by which answers were made where a program wrote them."""
    card: FileRef
    """Markdown for people."""

    def files(self) -> Iterable[FileRef]:
        """Every file that the version needs besides the manifest itself."""
        return [*super().files(), self.card]


M = TypeVar("M", FeatureManifest, InstructManifest)
_HOW_TO_MAKE = {
    "features": "`tinyemo ingest features` or `tinyemo features`",
    "instruct": "`tinyemo ingest instruct` or `tinyemo ingest oasis`",
}


def id_hash(sample_id: str) -> int:
    """The 64-bit number that orders and splits rows: blake2b of the id, 8 bytes, big endian."""
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=8).digest(), "big")


def load_manifest(uri: str, of: type[M]) -> M:
    """The manifest of a data set (`s3://bucket/datasets/emotion6`: the latest) or of one version (`.../<version>`).

    Raises:
        DataError: where what is stored is no manifest of this kind, or nothing was ingested there.
        StorageError: where S3 cannot be read.
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
            f"no data set at {uri}: put one there with {_HOW_TO_MAKE[_kind(of)]}, or see `tinyemo ingest --help`"
        ) from error
    return parse_manifest(document, root, of)


def parse_manifest(document: Any, uri: str, of: type[M]) -> M:
    """The manifest in a JSON document that was read from the version's folder `uri`.

    Raises:
        DataError: naming the first field that is wrong.
    """
    if not isinstance(document, dict):
        raise DataError(f"{uri}/manifest.json is not a manifest: ingest the data set again")
    kind = document.setdefault("kind", "features")  # as they were written before there was a second kind
    if kind != _kind(of):
        raise DataError(f"{uri} holds {kind}; this needs {_kind(of)}, made with {_HOW_TO_MAKE[_kind(of)]}")
    try:
        return of.model_validate({**document, "uri": uri})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DataError(
            f"{uri}/manifest.json: field {field}: {first['msg']}; {error.error_count()} field(s) are wrong"
        ) from error


def _kind(of: type[Manifest]) -> str:
    return str(of.model_fields["kind"].default)


def _check_bytes(reference: FileRef, uri: str, data: bytes) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != reference.sha256:
        raise DataError(
            f"{uri} is corrupt: {len(data)} bytes with sha256 {digest[:12]}, the manifest says "
            f"{reference.num_bytes} bytes with {reference.sha256[:12]}; ingest the data set again with --force"
        )


def read_file(manifest: Manifest, file: FileRef) -> bytes:
    """The bytes of one file of the version, checked against the manifest's sha256.

    Raises:
        DataError: where they are not the ones that were ingested.
        StorageError: where S3 cannot be read.
    """
    uri = manifest.file_uri(file.path)
    data = storage.read_bytes(uri)
    _check_bytes(file, uri, data)
    return data


def read_index(manifest: Manifest) -> pa.Table:
    """One line per row with the columns of INDEX_SCHEMA, checked against the manifest's sha256.

    Raises:
        DataError: where the index is corrupt or counts other rows than the manifest.
    """
    uri = manifest.file_uri(manifest.index.path)
    table = pq.read_table(io.BytesIO(read_file(manifest, manifest.index)))
    if table.schema != INDEX_SCHEMA or table.num_rows != manifest.rows_kept:
        raise DataError(f"{uri} is not the index of its manifest: ingest the data set again with --force")
    return table


def missing_files(manifest: Manifest) -> list[str]:
    """Paths of the version that are absent from S3 or have another size; one listing, no reads."""
    stored = storage.list_prefix(manifest.uri)
    return [file.path for file in manifest.files() if stored.get(manifest.file_uri(file.path)) != file.num_bytes]


def verify_manifest(manifest: Manifest) -> int:
    """Read every file of the version and compare its sha256; the bytes that were read.

    Raises:
        DataError: naming the first file, in the manifest's order, that is missing or corrupt.
    """

    def check(file: FileRef) -> int:
        uri = manifest.file_uri(file.path)
        try:
            data = storage.read_bytes(uri)
        except storage.MissingObjectError as error:
            raise DataError(
                f"{uri} is missing, the manifest names it: ingest the data set again with --force"
            ) from error
        _check_bytes(file, uri, data)
        return len(data)

    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        return sum(pool.map(check, manifest.files()))
