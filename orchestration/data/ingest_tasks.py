"""Ray Data tasks of an ingest: check a chunk of records, write a shard. Each reads its own input."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from orchestration.data.data_card import thumbnail
from orchestration.data.decisions import FACT_SCHEMA
from orchestration.data.feature_rows import FeatureSource
from orchestration.data.image_files import inspect_image, path_under_root, read_ahead, require_root, stored_image
from orchestration.data.ingest_rules import IngestRules, Layout, Reason, RejectedRecordError
from orchestration.data.manifest import IMAGE_SCHEMA, RECORD_SCHEMA, Kind, parquet_bytes, parquet_options
from orchestration.data.record_checks import (
    Record,
    check_labelled_image,
    check_record,
    claimed,
    parse_document,
    reject,
)
from orchestration.data.staging import RawRecord, Staged, places_by_chunk, read_chunk
from orchestration.data.tasks import MAX_RETRIES, guarded, run_unordered
from orchestration.services import storage
from tinyemo.errors import DataError

WRITTEN_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("num_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("rows", pa.int64()),
        (
            "pictures",
            pa.list_(pa.struct([("image", pa.binary()), ("task", pa.string()), ("label", pa.string())])),
        ),
    ]
)
"""Columns that `write_shard` returns."""


@dataclass(frozen=True)
class RecordSource:
    """Places of an ingest's records and images, and the rules for them; travels to the tasks."""

    kind: Kind
    """images or instruct."""
    staged: Staged
    file: str
    """Name of the input file."""
    images: str
    rules: IngestRules

    def read(self, raw: RawRecord) -> Record:
        """Return the record in a staged text.

        Raises:
            RejectedRecordError: with the first rule that it breaks.
        """
        if raw.problem is not None:
            reject(Reason(raw.reason), raw.problem)
        document = parse_document(raw.text)
        check = check_labelled_image if self.kind == "images" else check_record
        return check(document, self.rules)

    def originals(self, positions: NDArray[np.int64]) -> tuple[list[str], list[str | None]]:
        """Return the file name and text of each record at the ascending `positions` of the input."""
        texts: list[str | None] = []
        for chunk, places in places_by_chunk(self.staged, positions):
            raws = read_chunk(self.staged.uri, chunk)
            texts += [raws[place].text.decode(errors="backslashreplace") for place in places.tolist()]
        return [self.file] * len(texts), texts


Source = RecordSource | FeatureSource


@dataclass(frozen=True)
class ShardWork:
    """One shard to be written; S records.

    Attributes:
        uri: address of the shard.
        positions: (S,) int64, places of its records in the input, ascending.
        ids: (S,) final ids.
        image_sha256: (S, 32) uint8, of the image bytes that were checked.
        sampled: places among the S of which a small picture is wanted.
    """

    uri: str
    positions: NDArray[np.int64]
    ids: list[str]
    image_sha256: NDArray[np.uint8]
    sampled: list[int]


def check_chunk(source: Source, chunk: int) -> pa.Table:
    """Return FACT_SCHEMA, a row for each record of a chunk in its order; no record or image can make this fail.

    Raises:
        DataError: the images' folder is not on this node.
        StorageError: S3 fails.
    """
    if isinstance(source, FeatureSource):
        return source.check(chunk)
    require_root(source.images)
    rows: list[dict[str, Any]] = []
    by_path: dict[str, list[int]] = {}
    for raw in read_chunk(source.staged.uri, chunk):
        row, path = _check_text(raw, source)
        if path is not None:
            by_path.setdefault(path, []).append(len(rows))
        rows.append(row)
    for path, coming in read_ahead(by_path, source.images, source.rules.max_image_bytes):
        changes = _check_image(coming.result, source.rules)
        for place in by_path[path]:
            rows[place].update(changes)
    return pa.Table.from_pylist(rows, FACT_SCHEMA)


def _check_text(raw: RawRecord, source: RecordSource) -> tuple[dict[str, Any], str | None]:
    try:
        record = source.read(raw)
        path = path_under_root(record.image, source.images, source.rules.foreign_root)
    except RejectedRecordError as error:
        try:
            document = parse_document(raw.text)
        except RejectedRecordError:
            document = {}
        return {
            "number": raw.number,
            "id": claimed(document, "id"),
            "split": claimed(document, "split"),
            "label": claimed(document, "label"),
            "reason": str(error.reason),
            "detail": error.detail,
            "content": _hash16(raw.text),
        }, None
    content = record.content()
    texts = {role: sum(len(text) for who, text in record.turns if who == role) for role in ("human", "gpt")}
    return {
        "number": raw.number,
        "id": record.id,
        "split": record.split,
        "content": _hash16(content),
        "task": record.task,
        "label": record.label,
        "question_chars": texts["human"],
        "answer_chars": texts["gpt"],
        "text_bytes": len(content),
    }, path


def _check_image(read: Callable[[], bytes], rules: IngestRules) -> dict[str, Any]:
    try:
        facts = inspect_image(read(), rules)
    except RejectedRecordError as error:
        return {"reason": str(error.reason), "detail": error.detail}
    return {
        "image_sha256": bytes.fromhex(facts.sha256),
        "phash": facts.phash,
        "image_bytes": facts.num_bytes,
        "width": facts.width,
        "height": facts.height,
    }


def _hash16(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def write_shard(source: Source, layout: Layout, work: ShardWork) -> dict[str, Any]:
    """Store one shard and return its num_bytes, sha256, rows, and pictures of the sampled records.

    Raises:
        DataError: an image is not the one that was checked.
        StorageError: S3 fails.
    """
    pictures: list[dict[str, Any]] = []
    if isinstance(source, FeatureSource):
        data = parquet_bytes(source.tables(work.positions), layout.rows_per_group)
    else:
        data = _record_shard(source, layout, work, pictures)
    storage.write_bytes(work.uri, data)
    return {
        "uri": work.uri,
        "num_bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "rows": len(work.positions),
        "pictures": pictures,
    }


def _record_shard(source: RecordSource, layout: Layout, work: ShardWork, pictures: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    schema = IMAGE_SCHEMA if source.kind == "images" else RECORD_SCHEMA
    with pq.ParquetWriter(buffer, schema, **parquet_options(schema)) as writer:
        group: list[dict[str, Any]] = []
        for place, row in enumerate(_rows(source, work), start=1):
            group.append(row)
            if place - 1 in work.sampled:
                pictures.append({"image": thumbnail(row["image"]), "task": row["task"], "label": row["label"]})
            if len(group) == layout.rows_per_group or place == len(work.positions):
                writer.write_table(pa.Table.from_pylist(group, schema), row_group_size=len(group))
                group.clear()
    return buffer.getvalue()


def _rows(source: RecordSource, work: ShardWork) -> Iterator[dict[str, Any]]:
    require_root(source.images)
    rules = source.rules
    ahead: list[Record] = []

    def paths() -> Iterator[str]:
        for record in _records(source, work.positions):
            ahead.append(record)
            yield path_under_root(record.image, source.images, rules.foreign_root)

    for place, (path, coming) in enumerate(read_ahead(paths(), source.images, rules.max_image_bytes)):
        record = ahead.pop(0)
        try:
            image, width, height = stored_image(coming.result(), rules)
        except RejectedRecordError as error:
            raise DataError(f"{error.detail}, and was there when it was checked: run the same command again") from error
        digest = hashlib.sha256(image)
        if digest.digest() != work.image_sha256[place].tobytes():
            raise DataError(f"{path} changed after it was checked: run the same command again")
        yield {
            "id": work.ids[place],
            "image": image,
            "image_sha256": digest.hexdigest(),
            "width": width,
            "height": height,
            "task": record.task,
            "turns": [{"role": role, "text": text} for role, text in record.turns],
            "labels_offered": record.labels_offered,
            "label_stated": record.label_stated,
            "label": record.label,
            "source": record.source,
        }


def _records(source: RecordSource, positions: NDArray[np.int64]) -> Iterator[Record]:
    for chunk, places in places_by_chunk(source.staged, positions):
        raws = read_chunk(source.staged.uri, chunk)
        for place in places.tolist():
            yield source.read(raws[place])


def check_chunks(source: Source) -> Iterator[pa.Table]:
    """Yield the facts of every chunk and their position in the input, as tasks get done; call `connect` first.

    Raises:
        DataError, StorageError: see `check_chunk`.
    """

    def check(batch: pa.Table) -> pa.Table:
        (chunk,) = batch["chunk"].to_pylist()
        facts = check_chunk(source, chunk)
        return facts.append_column("position", pa.array(source.staged.starts[chunk] + np.arange(facts.num_rows)))

    return _run([{"chunk": chunk} for chunk in range(source.staged.num_chunks)], check)


def write_shards(source: Source, layout: Layout, works: list[ShardWork]) -> Iterator[dict[str, Any]]:
    """Yield the result of `write_shard` for every shard, as tasks get done; call `connect` first.

    Raises:
        DataError, StorageError: see `write_shard`.
    """

    def write(batch: pa.Table) -> pa.Table:
        written = [write_shard(source, layout, _unpack(item)) for item in batch.to_pylist()]
        return pa.Table.from_pylist(written, WRITTEN_SCHEMA)

    for table in _run([_pack(work) for work in works], write):
        yield from table.to_pylist()


def _pack(work: ShardWork) -> dict[str, Any]:
    return {
        "uri": work.uri,
        "ids": work.ids,
        "positions": work.positions.tobytes(),
        "image_sha256": work.image_sha256.tobytes(),
        "sampled": np.array(work.sampled, dtype=np.int64).tobytes(),
    }


def _unpack(row: dict[str, Any]) -> ShardWork:
    return ShardWork(
        row["uri"],
        np.frombuffer(row["positions"], dtype=np.int64),
        row["ids"],
        np.frombuffer(row["image_sha256"], dtype=np.uint8).reshape(-1, 32),
        np.frombuffer(row["sampled"], dtype=np.int64).tolist(),
    )


def _run(items: list[dict[str, Any]], work: Callable[[pa.Table], pa.Table]) -> Iterator[pa.Table]:
    def run(batch: pa.Table) -> pa.Table:
        return guarded(work, batch)

    return run_unordered(
        items, run, worker="a task", advice="run the same command again", num_cpus=1, max_retries=MAX_RETRIES
    )
