"""The order of instruct records is a pure function of (data set, seed, epoch, position)."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.streaming.epoch_plan import EpochPlan, MixedSet, Window, shuffle_quality
from orchestration.streaming.sampling import chunks_of, rank_slice

seeds = st.integers(0, 2**31)
DIGEST = hashlib.sha256(b"one").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def mixed_set(num_rows: int, *, digest: str = DIGEST, weight: float | None = None, group: int = 16) -> MixedSet:
    return MixedSet(digest, tuple(chunks_of(num_rows, group).tolist()), weight)


def plan(seed: int, *sizes: int, batch: int = 8, pool: int = 64, **settings: object) -> EpochPlan:
    sets = tuple(mixed_set(size, digest=digest) for size, digest in zip(sizes, (DIGEST, OTHER), strict=False))
    return replace(EpochPlan(sets, seed, batch, pool), **settings)


@settings(deadline=None, max_examples=60)
@given(seed=seeds, num_rows=st.integers(8, 900), epoch=st.integers(0, 4), pool=st.integers(1, 400))
def test_an_epoch_holds_every_record_once(seed: int, num_rows: int, epoch: int, pool: int) -> None:
    refs = plan(seed, num_rows, pool=pool).refs(epoch, 0, num_rows)
    assert np.array_equal(np.sort(refs.row), np.arange(num_rows))
    assert not refs.source.any()


@settings(deadline=None, max_examples=60)
@given(seed=seeds, num_rows=st.integers(8, 400), epoch=st.integers(0, 2), step=st.integers(0, 48))
def test_any_world_size_gives_the_same_global_batch(seed: int, num_rows: int, epoch: int, step: int) -> None:
    """Also one that does not divide the batch; and a step is the same whatever was asked for before it."""
    batch = plan(seed, num_rows).global_batch(epoch, step)
    for world_size in (1, 2, 3, 5):
        fresh = plan(seed, num_rows)
        parts = [fresh.global_batch(epoch, step).take(rank_slice(8, rank, world_size)) for rank in range(world_size)]
        assert np.array_equal(np.concatenate([part.row for part in parts]), batch.row)


@settings(deadline=None, max_examples=60)
@given(
    seed=seeds,
    num_rows=st.integers(8, 300),
    start=st.integers(0, 120),
    tail=st.sampled_from(["drop", "pad"]),
    epochs=st.floats(0.3, 3),
)
def test_any_step_can_be_the_start(seed: int, num_rows: int, start: int, tail: str, epochs: float) -> None:
    """Windows from any step hold the steps that are left, cut where a fresh run cuts them."""
    steps = plan(seed, num_rows, tail=tail)
    num_steps = int(steps.steps_per_epoch * epochs)
    start = min(start, num_steps)
    windows = steps.windows(start, num_steps)
    found = [w.epoch * steps.steps_per_epoch + step for w in windows for step in range(w.first, w.last)]
    assert found == list(range(start, num_steps))
    assert set(windows[1:]) <= set(steps.windows(0, num_steps))
    assert all(0 <= w.first < w.last <= steps.steps_per_epoch for w in windows)


def test_smaller_windows_hold_the_same_steps() -> None:
    """Windows are a matter of reading; the order does not know them."""
    steps = plan(5, 300)
    whole, parts = steps.windows(3, 50), steps.windows(3, 50, window_rows=20)
    assert {w.last - w.first for w in parts} <= {1, 2}
    for windows in (whole, parts):
        assert [(w.epoch, s) for w in windows for s in range(w.first, w.last)] == [divmod(s, 37) for s in range(3, 50)]
    assert len(parts) > 3 * len(whole)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, num_rows=st.integers(1, 60), batch=st.integers(1, 16))
def test_the_tail_is_dropped_or_padded_with_masked_records(seed: int, num_rows: int, batch: int) -> None:
    padded = plan(seed, num_rows, batch=batch, tail="pad")
    dropped = plan(seed, num_rows, batch=batch, tail="drop")
    rows = padded.steps(Window(0, 0, padded.steps_per_epoch)).row
    assert np.array_equal(np.sort(rows[rows >= 0]), np.arange(num_rows))
    assert len(rows) % batch == 0
    assert (rows < 0).sum() < batch
    assert dropped.steps_per_epoch == num_rows // batch
    assert np.array_equal(dropped.steps(Window(0, 0, dropped.steps_per_epoch)).row, rows[: num_rows // batch * batch])


def test_a_pool_reads_few_row_groups() -> None:
    """64 of 100 row groups of 16 rows: a pool of 64 rows touches 4, or 5 with a short one; all of them once."""
    steps = plan(7, 1600)
    for window in steps.windows(0, steps.steps_per_epoch):
        assert len(np.unique(steps.steps(window).row // 16)) <= 5
    touched = [set((steps.steps(w).row // 16).tolist()) for w in steps.windows(0, steps.steps_per_epoch)]
    assert sum(map(len, touched)) == 100


@settings(deadline=None, max_examples=40)
@given(seed=seeds, sizes=st.tuples(st.integers(20, 300), st.integers(20, 300)), share=st.floats(0.1, 0.9))
def test_a_mix_keeps_its_weights_everywhere(seed: int, sizes: tuple[int, int], share: float) -> None:
    sets = (mixed_set(sizes[0], weight=share), mixed_set(sizes[1], digest=OTHER, weight=1 - share))
    steps = EpochPlan(sets, seed, 8, 64)
    total = sum(sizes)
    assert sum(steps.counts) == total
    assert abs(steps.counts[0] - share * total) <= 1
    refs = steps.refs(0, 0, total)
    first = np.cumsum(refs.source == 0)
    expected = np.arange(1, total + 1) * steps.counts[0] / total
    assert np.abs(first - expected).max() <= 2, "any stretch holds the same mix"


@settings(deadline=None, max_examples=40)
@given(seed=seeds, sizes=st.tuples(st.integers(20, 200), st.integers(20, 200)))
def test_a_mix_gives_every_record_its_turn(seed: int, sizes: tuple[int, int]) -> None:
    """Without weights each record once an epoch; with weights none a second time before all had their first."""
    unweighted = plan(seed, *sizes)
    refs = unweighted.refs(1, 0, sum(sizes))
    for place, size in enumerate(sizes):
        assert np.array_equal(np.sort(refs.row[refs.source == place]), np.arange(size))
    weighted = EpochPlan((mixed_set(sizes[0], weight=3), mixed_set(sizes[1], digest=OTHER, weight=1)), seed, 8, 64)
    rows = np.concatenate([r.row[r.source == 0] for r in (weighted.refs(epoch, 0, sum(sizes)) for epoch in range(3))])
    seen = np.bincount(rows, minlength=sizes[0])
    assert seen.max() - seen.min() <= 1


def test_seed_epoch_and_data_change_the_order() -> None:
    orders = {
        tuple(EpochPlan((mixed_set(50, digest=digest),), seed, 8, 64).refs(epoch, 0, 50).row)
        for seed in (0, 1)
        for epoch in (0, 1)
        for digest in (DIGEST, OTHER)
    }
    assert len(orders) == 8


def test_the_order_is_the_one_that_was_published() -> None:
    """A golden value: an order that changes between releases would break the resume of runs that wait."""
    row = plan(7, 1600).refs(1, 0, 1600).row
    assert hashlib.sha256(row.tobytes()).hexdigest()[:16] == "fe28fb7351ee2c2a"


def test_quality_of_no_shuffle_a_pool_and_a_whole_permutation() -> None:
    """A uniform permutation moves a row by a third of the epoch."""
    whole = shuffle_quality(plan(1, 1600, pool=1600))
    pools = shuffle_quality(plan(1, 1600, pool=64))
    assert abs(whole.mean_distance - 1 / 3) < 0.03
    assert abs(pools.mean_distance - 1 / 3) < 0.05, "row groups come from everywhere"
    assert whole.neighbours_together < 0.02 < pools.neighbours_together < 0.15
    assert pools.row_groups_per_step < 5 < whole.row_groups_per_step
