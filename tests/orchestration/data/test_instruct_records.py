"""Files of records are read as a stream, whatever is in them."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.data.ingest_tasks import places_by_chunk
from orchestration.data.staging import (
    MAX_RECORD_BYTES,
    RawRecord,
    Staged,
    read_chunk,
    read_raw_records,
    stage_records,
)
from orchestration.services import storage
from tinyemo.errors import DataError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def read(data: bytes) -> list[RawRecord]:
    return list(read_raw_records(io.BufferedReader(io.BytesIO(data))))  # type: ignore[arg-type]  # a BytesIO is raw enough


def parsed(records: list[RawRecord]) -> list[Any]:
    assert all(record.problem is None for record in records)
    return [json.loads(record.text) for record in records]


@settings(deadline=None)
@given(values=st.lists(json_values, max_size=6), indent=st.sampled_from([None, 1]), has_mark=st.booleans())
def test_an_array_comes_out_element_by_element(values: list[Any], indent: int | None, has_mark: bool) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=False).encode("utf-8", "replace")
    records = read((b"\xef\xbb\xbf" if has_mark else b"") + b" \n" + text)
    assert [record.number for record in records] == list(range(1, len(values) + 1))
    assert parsed(records) == json.loads(text)


@settings(deadline=None)
@given(values=st.lists(st.dictionaries(st.text(), st.text(), max_size=3), min_size=1, max_size=6), end=st.booleans())
def test_lines_come_out_one_by_one_with_their_numbers(values: list[Any], end: bool) -> None:
    lines = [json.dumps(value).encode() for value in values]
    data = b"\r\n\n  \n".join(lines) + (b"\n" if end else b"")
    records = read(data)
    assert parsed(records) == values
    assert [record.number for record in records] == list(range(1, 3 * len(values), 3))


@settings(deadline=None)
@given(cut=st.integers(0, 400))
def test_a_cut_array_gives_what_is_whole_and_one_problem(cut: int) -> None:
    values = [{"id": str(n), "text": "x" * n} for n in range(8)]
    text = json.dumps(values).encode()
    data = text[: min(cut + 1, len(text) - 1)]
    *whole, last = read(data)
    assert parsed(whole) == values[: len(whole)]
    assert last.number == len(whole) + 1
    assert f"broken after element {len(whole)}" in (last.problem or "")
    assert len(whole) >= data.count(b"}, ")


@pytest.mark.parametrize(
    ("data", "num_whole"),
    [
        (b'[{"id": 1}, {"id": 2} {"id": 3}]', 2),
        (b'[{"id": 1},]', 1),
        (b'[{"id": 1}] and more', 1),
        (b'[{"id": 1}, {"id": "\xff"}]', 1),
        (b'[{"id": 1}, {"id": NaN}]', 1),
        (b"[", 0),
    ],
)
def test_a_broken_array_ends_with_one_problem(data: bytes, num_whole: int) -> None:
    *whole, last = read(data)
    assert len(parsed(whole)) == num_whole
    assert last.problem is not None
    assert "\n" not in last.problem


def test_numbers_of_an_array_stay_what_they_are() -> None:
    records = read(b'[{"a": 12345678901234567890123, "b": 0.1, "c": 1e400}]')
    assert b"12345678901234567890123" in records[0].text
    assert json.loads(records[0].text)["b"] == 0.1


def test_an_element_that_is_too_deep_is_one_problem_and_the_next_one_is_read() -> None:
    deep = b"[" * 5_000 + b"]" * 5_000
    first, second = read(b'[{"a": ' + deep + b'}, {"a": 1}]')
    assert first.problem == "nested too deep to read"
    assert json.loads(second.text) == {"a": 1}


@pytest.mark.parametrize("size", [-1, 0, 1, 3 * MAX_RECORD_BYTES])
def test_a_line_of_any_length_is_read_in_bounded_memory(size: int) -> None:
    """A line may have MAX_RECORD_BYTES; of a longer one the beginning stays, and the next line is the next record."""
    line = b"x" * (MAX_RECORD_BYTES + size)
    first, second = read(b"\n".join([line, b"{}"]))
    assert (second.number, second.text, second.problem) == (2, b"{}", None)
    assert first.text == line[:MAX_RECORD_BYTES]
    assert (first.problem is None) == (size <= 0)


def test_chunks_hold_the_records_in_order_and_are_removed(s3_root: str, tmp_path: Any) -> None:
    lines = [json.dumps({"id": n}) for n in range(23)]
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines))
    progress: list[tuple[str, int, int]] = []
    staged = stage_records(
        str(path), f"{s3_root}/staged", records_per_chunk=10, advance=lambda *now: progress.append(now)
    )
    assert staged.starts == (0, 10, 20, 23)
    assert (staged.num_records, staged.num_chunks, staged.num_bytes) == (23, 3, path.stat().st_size)
    found = [record for chunk in range(3) for record in read_chunk(staged.uri, chunk)]
    assert [record.text.decode() for record in found] == lines
    assert [record.number for record in found] == list(range(1, 24))
    assert progress[-1] == ("read", path.stat().st_size, path.stat().st_size)
    storage.delete_prefix(staged.uri)
    assert storage.list_prefix(staged.uri) == {}


def test_a_chunk_ends_early_where_records_are_long(s3_root: str, tmp_path: Any) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"id": "x" * 3_000_000}) for _ in range(7)))
    staged = stage_records(str(path), f"{s3_root}/staged", records_per_chunk=1000, advance=lambda *now: None)
    assert staged.starts == (0, 3, 6, 7)


def test_an_empty_array_is_a_clear_line(s3_root: str, tmp_path: Any) -> None:
    path = tmp_path / "records.json"
    path.write_text("[]")
    with pytest.raises(DataError, match="holds no record"):
        stage_records(str(path), f"{s3_root}/staged", records_per_chunk=10, advance=lambda *now: None)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=8), data=st.data())
def test_every_position_is_found_in_its_chunk(sizes: list[int], data: st.DataObject) -> None:
    import numpy as np

    starts = np.r_[0, np.cumsum(sizes)]
    staged = Staged("s3://x/y", tuple(starts.tolist()), "", 0)
    positions = np.array(sorted(data.draw(st.sets(st.integers(0, int(starts[-1]) - 1)))), dtype=np.int64)
    found = [int(starts[chunk]) + place for chunk, places in places_by_chunk(staged, positions) for place in places]
    assert found == positions.tolist()
    assert all(len(places) and places.max() < sizes[chunk] for chunk, places in places_by_chunk(staged, positions))
