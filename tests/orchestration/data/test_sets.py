"""What a process remembers of shards: right from any thread, within its bytes, the value used last always there."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_files import record, write_records

from orchestration.data import sets
from orchestration.data.sets import RecordSet, open_record_set, read_records, remember

NUM_THREADS = 8


@pytest.fixture
def busy_interpreter() -> Iterator[None]:
    """Threads change places after almost every instruction."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_that_push_each_others_row_groups_out_get_what_they_asked_for(
    s3_root: str, busy_interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for one row group, and the threads want seventeen."""
    write_records(s3_root, [record(number) for number in range(131)])
    tiny = remember(1, key=lambda uri, shard, place, columns: (uri, place), num_bytes=lambda table: int(table.nbytes))
    monkeypatch.setattr(sets, "_row_group", tiny(sets._row_group.__wrapped__))
    record_set = open_record_set(f"{s3_root}/drawn", "train")

    def read(seed: int) -> None:
        rows = np.random.default_rng(seed).integers(0, 131, 40)
        assert read_records(record_set, rows, ["id"])["id"].to_pylist() == [f"r{number:05d}" for number in rows]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        list(pool.map(read, range(12)))


def test_a_selection_counts_its_own_rows(s3_root: str) -> None:
    """Validation carved out of train is a selection of rows; its row groups count the selected rows alone."""
    write_records(s3_root, [record(number) for number in range(131)])
    whole = open_record_set(f"{s3_root}/drawn", "train")
    rows = np.array([0, 1, 50, 99, 100, 130])
    chosen = whole.select(rows)
    assert chosen.num_rows == chosen.planned().groups.num_rows == 6
    assert read_records(chosen, np.array([5, 2, 2]), ["id"])["id"].to_pylist() == ["r00130", "r00050", "r00050"]
    again = chosen.select(np.array([1, 3, 5]))
    assert read_records(again, np.arange(3), ["id"])["id"].to_pylist() == ["r00001", "r00099", "r00130"]
    assert len(read_records(again, np.arange(0), ["id"])) == 0
    assert isinstance(again, RecordSet)
    assert again.planned().groups.num_groups == len(np.unique(whole.stored_groups.groups_of(rows[[1, 3, 5]])))


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60), st.integers(1, 40))
def test_it_keeps_what_was_used_last_and_no_more_bytes_than_it_may(sizes: list[int], max_bytes: int) -> None:
    """Against the plain rule: newest first, as many as fit; the newest also where it is too large."""
    read: list[int] = []

    @remember(max_bytes, key=lambda size: size, num_bytes=int)
    def value_of(size: int) -> int:
        read.append(size)
        return size

    kept: list[int] = []
    for size in sizes:
        read.clear()
        assert value_of(size) == size
        assert read == [] if size in kept else [size]
        kept = [size, *(other for other in kept if other != size)]
        while len(kept) > 1 and sum(kept) > max_bytes:
            kept.pop()


def test_threads_that_want_the_same_wait_for_one_that_reads(busy_interpreter: None) -> None:
    read: list[str] = []

    @remember(10, key=lambda name: name, num_bytes=len)
    def value_of(name: str) -> str:
        read.append(name)
        time.sleep(0.05)
        return name

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(value_of, ["shard"] * NUM_THREADS)) == ["shard"] * NUM_THREADS
    assert read == ["shard"]


def test_a_failed_read_is_not_remembered() -> None:
    answers = iter([OSError("gone"), "value"])

    @remember(10, key=lambda: 0, num_bytes=len)
    def value_of() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    with pytest.raises(OSError, match="gone"):
        value_of()
    assert value_of() == "value"
