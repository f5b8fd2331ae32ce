"""The order of samples is a pure function of (seed, epoch, index)."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.streaming.sampling import CHUNK_ROWS, SampleOrder, TrainPlan, chunks_of, epoch_order, rank_slice

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 700)


def plan(seed: int, num_rows: int, batch: int = 12, epochs: float = 3, pool: int = 65_536) -> TrainPlan:
    return TrainPlan(SampleOrder(num_rows, seed, pool), batch, epochs)


@settings(deadline=None)
@given(seed=seeds, num_rows=sizes, epoch=st.integers(0, 5))
def test_an_epoch_holds_every_row_once(seed: int, num_rows: int, epoch: int) -> None:
    order = epoch_order(chunks_of(num_rows, CHUNK_ROWS), entropy=(seed, epoch), pool_rows=65_536)
    assert np.array_equal(np.sort(order), np.arange(num_rows))


@settings(deadline=None, max_examples=10)
@given(seed=seeds, num_chunks=st.integers(2, 6), extra=st.integers(0, CHUNK_ROWS - 1))
def test_a_pool_smaller_than_the_split_still_holds_every_row_once(seed: int, num_chunks: int, extra: int) -> None:
    num_rows, pool = num_chunks * CHUNK_ROWS + extra, 2 * CHUNK_ROWS
    order = epoch_order(chunks_of(num_rows, CHUNK_ROWS), entropy=(seed, 1), pool_rows=pool)
    assert np.array_equal(np.sort(order), np.arange(num_rows))
    # A pool reads from as many chunks as fit into it, and one more where the short chunk falls into it.
    assert all(len(np.unique(order[i : i + pool] // CHUNK_ROWS)) <= 3 for i in range(0, num_rows, pool))


@settings(deadline=None)
@given(seed=seeds, num_rows=st.integers(12, 700), step=st.integers(0, 99))
def test_a_step_holds_the_same_samples_at_any_world_size(seed: int, num_rows: int, step: int) -> None:
    batch = plan(seed, num_rows).global_batch(step)
    for world_size in (1, 2, 3, 4, 6):
        parts = [batch[rank_slice(len(batch), rank, world_size)] for rank in range(world_size)]
        assert np.array_equal(np.concatenate(parts), batch)
        assert {len(part) for part in parts} == {len(batch) // world_size}


@settings(deadline=None)
@given(seed=seeds, num_rows=st.integers(12, 300), window=st.integers(1, 20), start=st.integers(0, 40))
def test_windows_from_any_step_hold_the_steps_that_are_left(seed: int, num_rows: int, window: int, start: int) -> None:
    steps = plan(seed, num_rows)
    start = min(start, steps.num_steps)
    windows = steps.windows(start, window)
    assert [s for first, last in windows for s in range(first, last)] == list(range(start, steps.num_steps))
    assert all(last - first <= window for first, last in windows)
    assert set(windows[1:]) <= set(steps.windows(0, window))


def test_the_tail_of_an_epoch_goes_into_the_next() -> None:
    steps = plan(seed=3, num_rows=10, batch=4, epochs=2)
    assert steps.num_steps == 5
    seen = np.concatenate([steps.global_batch(step) for step in range(steps.num_steps)])
    assert np.array_equal(np.bincount(seen), np.full(10, 2))
    assert steps.steps_of_epoch_ends() == [3, 5]


def test_epochs_differ_and_seeds_differ() -> None:
    chunk_sizes = chunks_of(50, 16)
    orders = [tuple(epoch_order(chunk_sizes, entropy=(s, e), pool_rows=64)) for s in (0, 1) for e in (0, 1)]
    assert len(set(orders)) == 4


def test_the_order_is_the_one_that_was_published() -> None:
    """Golden values: an order that changes between releases would break the resume of runs that wait."""
    for num_rows, pool, digest in ((700, 65_536, "e98bd6461c4b1c56"), (5000, 2048, "d369cc8c5a4e1540")):
        order = epoch_order(chunks_of(num_rows, CHUNK_ROWS), entropy=(7, 2), pool_rows=pool)
        assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == digest
