"""Input of any size, read once as a stream and staged in S3 in chunks of records that any node can check.

A record is JSON text: a line of JSON Lines, an element of an array, a row of a table of labels, or a file in a folder
that is named after its label.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from orchestration.data.ingest_rules import Reason
from orchestration.data.manifest import Advance
from orchestration.services import storage
from tinyemo.errors import DataError, StorageError

MAX_RECORD_BYTES = 4 * 2**20
"""Of one record's text; a longer one is rejected and its beginning kept."""
CHUNK_BYTES = 8 * 2**20
"""A chunk ends with the record that reaches this."""
READ_BYTES = 2**20

CHUNK_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),  # line of a JSON Lines file or element of an array, from 1
        ("text", pa.binary()),  # as it came; an array's element as JSON again
        ("problem", pa.string()),  # why the text cannot be a record, null where it may be one
        ("reason", pa.string()),  # code of that problem
    ]
)


@dataclass(frozen=True)
class RawRecord:
    """The text of one record, unread."""

    number: int
    text: bytes
    problem: str | None = None
    reason: str = Reason.BAD_JSON


@dataclass(frozen=True)
class Staged:
    """The chunks of an input in S3."""

    uri: str
    starts: tuple[int, ...]
    """Position of each chunk's first record, and after the last the number of records."""
    sha256: str
    """Of the file that was read."""
    num_bytes: int

    @property
    def num_records(self) -> int:
        """Records in all chunks, readable or not."""
        return self.starts[-1]

    @property
    def num_chunks(self) -> int:
        """Objects under `uri`."""
        return len(self.starts) - 1


class _Tap(io.RawIOBase):
    """A file that is read once, with its sha256 and size so far; failures are DataError or StorageError."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        try:
            data = self._file.read(len(view))
        except OSError as error:
            kind = StorageError if self._name.startswith("s3://") else DataError
            raise kind(f"{self._name} cannot be read after byte {self.num_bytes} ({error})") from error
        view[: len(data)] = data
        self.digest.update(data)
        self.num_bytes += len(data)
        return len(data)


@contextlib.contextmanager
def _open(records: str) -> Iterator[tuple[_Tap, int]]:
    if records.startswith("s3://"):
        if not storage.exists(records):
            raise DataError(f"{records} does not exist: check the address")
        filesystem, path = storage.filesystem(), records.removeprefix("s3://")
        size = filesystem.get_file_info(path).size
        with filesystem.open_input_stream(path) as file:
            yield _Tap(file, records), size
        return
    local = Path(records)
    if not local.is_file():
        raise DataError(f"{records} is no file: name a JSON array or a JSON Lines file, here or in S3")
    with local.open("rb", buffering=0) as raw:
        yield _Tap(raw, records), local.stat().st_size


def read_raw_records(file: io.BufferedReader) -> Iterator[RawRecord]:
    """Yield the records of a JSON array or of JSON Lines, unread; the first character tells which of the two.

    A line that is no JSON is a record like any other here. Where an array is broken its last record says so.
    """
    if file.peek(3).startswith(b"\xef\xbb\xbf"):
        file.read(3)
    is_array = file.peek(1).lstrip()[:1] == b"["
    return _read_elements(file) if is_array else _read_lines(file)


def _read_lines(file: io.BufferedReader) -> Iterator[RawRecord]:
    number = 0
    while line := file.readline(MAX_RECORD_BYTES + 1):
        number += 1
        is_cut = len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n")
        rest = line
        while is_cut and rest and not rest.endswith(b"\n"):
            rest = file.readline(READ_BYTES)
        if line.strip():
            yield _limited(number, line if is_cut else line.strip())


def _limited(number: int, text: bytes) -> RawRecord:
    if len(text) <= MAX_RECORD_BYTES:
        return RawRecord(number, text)
    return RawRecord(number, text[:MAX_RECORD_BYTES], f"longer than {MAX_RECORD_BYTES} bytes; cut off there")


def _read_elements(file: io.BufferedReader) -> Iterator[RawRecord]:
    number = 0
    try:
        for element in ijson.items(file, "item"):
            number += 1
            try:
                text = json.dumps(element, ensure_ascii=False, default=_number).encode("utf-8", "surrogatepass")
            except RecursionError:
                yield RawRecord(number, b"", "nested too deep to read")
            else:
                yield _limited(number, text)
    except ijson.JSONError as error:
        reason = str(error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else error)
        yield RawRecord(number + 1, b"", f"the array is broken after element {number}: {reason.splitlines()[0]}")


def _number(value: Any) -> float:
    """Return a fraction, which ijson hands out as a decimal, as a float."""
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{type(value).__name__} in JSON")


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SPLIT_FOLDERS = ("train", "test", "val", "validation", "dev")


def read_labels(file: io.BufferedReader, name: str) -> Iterator[RawRecord]:
    """Yield the rows of a table with the columns image, label (or emotion) and, if it has them, split and id.

    Raises:
        DataError: a column is missing.
    """
    first = file.peek(1)[:1]
    if first in (b"{", b"["):
        raise DataError(f"{name} holds JSON, not a table: for LLaVA records use `tinyemo ingest instruct`")
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="")
    rows = csv.DictReader(text, delimiter="\t" if name.lower().endswith(".tsv") else ",", restkey="(more)")
    try:
        columns = [column.strip().lower() for column in rows.fieldnames or ()]
    except csv.Error as error:
        raise DataError(f"{name} is no table ({error}): write it as .csv or .tsv with a first line of names") from error
    label = next((column for column in ("label", "emotion") if column in columns), None)
    if "image" not in columns or label is None:
        raise DataError(f"{name} lacks the column(s) image, label (or emotion): it has {', '.join(columns) or 'none'}")
    rows.fieldnames = columns
    number = 1
    while True:
        number += 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRecord(number, b"", f"the row cannot be read ({error})", Reason.BAD_ROW)
            continue
        fields = {"image": row["image"], "label": row[label], "split": row.get("split"), "id": row.get("id")}
        record = {key: value.strip() for key, value in fields.items() if value is not None and value.strip()}
        problem = "more fields than the first line names" if "(more)" in row else None
        yield RawRecord(number, json.dumps(record, ensure_ascii=False).encode(), problem, Reason.BAD_ROW)


def read_label_folders(root: str) -> Iterator[RawRecord]:
    """Yield every image file below `root`; its folder is its label, and a folder train, val or test above is its split.

    Raises:
        DataError: there is no image in a folder.
    """
    if root.startswith("s3://"):
        paths = sorted(uri.removeprefix(f"{root.rstrip('/')}/") for uri in storage.list_prefix(root))
    else:
        paths = sorted(path.relative_to(root).as_posix() for path in Path(root).rglob("*"))
    number = 0
    for path in paths:
        *folders, file = path.split("/")
        if not folders or file.startswith(".") or not file.lower().endswith(IMAGE_SUFFIXES):
            continue
        number += 1
        split = next((folder for folder in folders[:-1] if folder in SPLIT_FOLDERS), None)
        record = {"image": path, "label": folders[-1]} | ({"split": split} if split else {})
        yield RawRecord(number, json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogateescape"))


def stage_labels(labels: str | None, images: str, uri: str, *, records_per_chunk: int, advance: Advance) -> Staged:
    """Stage the rows of a table of labels or, without one, the image files of a folder for each label.

    Raises:
        DataError: the table or folder is not there, cannot be read or holds no image.
        StorageError: S3 fails.
    """
    if labels is None:
        staged = _stage(read_label_folders(images), uri, records_per_chunk)
        if not staged:
            raise DataError(
                f"{images} holds no image in a folder: name a table with --labels, or make a folder a label"
            )
        return Staged(uri, staged, "", 0)
    with _open(labels) as (tap, _size):
        starts = _stage(read_labels(io.BufferedReader(tap, READ_BYTES), labels), uri, records_per_chunk)
        if not starts:
            raise DataError(f"{labels} has no row under its first line")
        advance("read", tap.num_bytes, tap.num_bytes)
        return Staged(uri, starts, tap.digest.hexdigest(), tap.num_bytes)


def _stage(
    records: Iterator[RawRecord], uri: str, records_per_chunk: int, after: Callable[[], None] = lambda: None
) -> tuple[int, ...]:
    """Write records in chunks and return where each chunk starts, then their number; one chunk is in memory at a time.

    No start at all means that there was no record.
    """
    starts = [0]
    chunk: list[RawRecord] = []

    def put() -> None:
        storage.write_bytes(f"{uri}/{_chunk_name(len(starts) - 1)}", _to_ipc(chunk))
        starts.append(starts[-1] + len(chunk))
        chunk.clear()
        after()

    num_bytes = 0
    for raw in records:
        chunk.append(raw)
        num_bytes += len(raw.text)
        if len(chunk) == records_per_chunk or num_bytes >= CHUNK_BYTES:
            put()
            num_bytes = 0
    if chunk:
        put()
    return tuple(starts) if len(starts) > 1 else ()


def stage_records(records: str, uri: str, *, records_per_chunk: int, advance: Advance) -> Staged:
    """Stage the records of a file of LLaVA records.

    Raises:
        DataError: the file is not there, cannot be read or holds no record.
        StorageError: S3 fails.
    """
    with _open(records) as (tap, size):
        if records.lower().endswith((".csv", ".tsv")):
            raise DataError(f"{records} is a table of labels, not LLaVA records: use `tinyemo ingest images --labels`")
        starts = _stage(
            read_raw_records(io.BufferedReader(tap, READ_BYTES)),
            uri,
            records_per_chunk,
            lambda: advance("read", tap.num_bytes, max(size, tap.num_bytes)),
        )
        if not starts:
            raise DataError(f"{records} holds no record: it must be a JSON array or JSON Lines")
        return Staged(uri, starts, tap.digest.hexdigest(), tap.num_bytes)


def _chunk_name(chunk: int) -> str:
    return f"{chunk:06d}.arrow"


def _to_ipc(chunk: list[RawRecord]) -> bytes:
    table = pa.Table.from_pylist([vars(raw) for raw in chunk], schema=CHUNK_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def read_chunk(uri: str, chunk: int) -> list[RawRecord]:
    """Return the records of one chunk that `stage_records` put under `uri`.

    Raises:
        StorageError: S3 fails, or the staged records were removed.
    """
    table = pa.ipc.open_stream(storage.read_bytes(f"{uri}/{_chunk_name(chunk)}")).read_all()
    return [RawRecord(**row) for row in table.to_pylist()]


def places_by_chunk(staged: Staged, positions: NDArray[np.int64]) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each chunk that holds some of the ascending positions, with their places in it."""
    starts = np.array(staged.starts)
    chunks = np.searchsorted(starts, positions, side="right") - 1
    for chunk in np.unique(chunks).tolist():
        yield chunk, positions[chunks == chunk] - starts[chunk]
