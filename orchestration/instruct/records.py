"""Files of records of any size, read once as a stream and staged in S3 in chunks of text that any node can check."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import pyarrow as pa

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
    ]
)


@dataclass(frozen=True)
class RawRecord:
    """The text of one record, unread."""

    number: int
    text: bytes
    problem: str | None = None


@dataclass(frozen=True)
class Staged:
    """What `stage_records` put into S3."""

    uri: str
    starts: tuple[int, ...]
    """Position of each chunk's first record, and behind the last the number of records."""
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
    """A file that is read once, with its sha256 and size so far; its failures are errors of ours."""

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
    """A local file or an object in S3, and its size.

    Raises:
        DataError, StorageError: it is not there.
    """
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
    """The records of a JSON array or of JSON Lines, unread; which of the two, the first character says.

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
    """The record, or its beginning where it is too long."""
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
    """ijson hands out fractions as decimals."""
    if isinstance(value, Decimal):
        return float(value)
    raise TypeError(f"{type(value).__name__} in JSON")


def stage_records(
    records: str, uri: str, *, records_per_chunk: int, advance: Callable[[str, int, int], None]
) -> Staged:
    """Put the records of a file into chunks under `uri`; one chunk is in memory at a time, and few on their way.

    Raises:
        DataError: the file is not there, cannot be read or holds no record.
        StorageError: S3 fails.
    """
    starts = [0]
    with _open(records) as (tap, size):
        chunk: list[RawRecord] = []

        def put() -> None:
            storage.write_bytes(f"{uri}/{_chunk_name(len(starts) - 1)}", _to_ipc(chunk))
            starts.append(starts[-1] + len(chunk))
            chunk.clear()
            advance("read", tap.num_bytes, max(size, tap.num_bytes))

        chunk_bytes = 0
        for raw in read_raw_records(io.BufferedReader(tap, READ_BYTES)):
            chunk.append(raw)
            chunk_bytes += len(raw.text)
            if len(chunk) == records_per_chunk or chunk_bytes >= CHUNK_BYTES:
                put()
                chunk_bytes = 0
        if chunk:
            put()
    if starts == [0]:
        raise DataError(f"{records} holds no record: it must be a JSON array or JSON Lines")
    return Staged(uri, tuple(starts), tap.digest.hexdigest(), tap.num_bytes)


def _chunk_name(chunk: int) -> str:
    return f"{chunk:06d}.arrow"


def _to_ipc(chunk: list[RawRecord]) -> bytes:
    rows = [{"number": raw.number, "text": raw.text, "problem": raw.problem} for raw in chunk]
    table = pa.Table.from_pylist(rows, schema=CHUNK_SCHEMA)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue().to_pybytes())


def read_chunk(uri: str, chunk: int) -> list[RawRecord]:
    """The records of one chunk that `stage_records` put under `uri`.

    Raises:
        StorageError: S3 fails, or the staged records were removed.
    """
    table = pa.ipc.open_stream(storage.read_bytes(f"{uri}/{_chunk_name(chunk)}")).read_all()
    return [RawRecord(**row) for row in table.to_pylist()]


def remove_staged(uri: str) -> None:
    """Delete everything under `uri`."""
    with ThreadPoolExecutor(storage.TRANSFER_THREADS) as pool:
        list(pool.map(storage.delete, storage.list_prefix(uri)))
