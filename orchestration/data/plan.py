"""The order of a run's records: a pure function of (data set, seed, epoch, position), computed window by window.

Each data set has its own endless order, epoch after epoch. In one of its epochs the row groups are permuted by a keyed
permutation that needs no table, consecutive groups of that permutation form a pool, and a generator keyed by (seed,
epoch, pool, data set) shuffles the rows of the pool. Several data sets are mixed by a closed form that says which of
them stands at a position. So computing a pool costs what the pool holds, however large the data set is.

A window is a pool of one data set: what one reading task fetches, and it fetches nothing that another window needs.
Windows come in the order in which their first record is needed. Who reads a record changes nothing here.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.random import SeedSequence, default_rng
from numpy.typing import NDArray

ORDER_VERSION = 2
"""Changes whenever the order of records changes; a run that another version began cannot go on."""

PADDING = -1
Tail = Literal["drop", "pad", "carry"]
Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class RowGroups:
    """Rows of each row group of a data set in storage order, as runs of equal groups.

    Attributes:
        counts: (R,) number of row groups in each run.
        rows: (R,) rows of every row group in that run, at least 1.
    """

    counts: Ints
    rows: Ints

    @staticmethod
    def of(group_rows: Sequence[int] | Ints) -> RowGroups:
        """Return the row groups whose sizes are listed one by one."""
        sizes = np.asarray(group_rows, dtype=np.int64)
        first = np.flatnonzero(np.diff(sizes, prepend=-1))
        return RowGroups(np.diff(first, append=len(sizes)), sizes[first])

    @staticmethod
    def of_shards(shard_rows: Sequence[int] | Ints, rows_per_group: int) -> RowGroups:
        """Return the row groups of shards in which only the last row group may be shorter than `rows_per_group`."""
        whole, rest = np.divmod(np.asarray(shard_rows, dtype=np.int64), rows_per_group)
        counts = np.stack([whole, (rest > 0).astype(np.int64)], axis=1).ravel()
        rows = np.stack([np.full_like(rest, rows_per_group), rest], axis=1).ravel()
        return RowGroups(counts[counts > 0], rows[counts > 0])

    @cached_property
    def num_groups(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def num_rows(self) -> int:
        return int(self.counts @ self.rows)

    @cached_property
    def _first_group(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.counts)])

    @cached_property
    def _first_row(self) -> Ints:
        return np.concatenate([[0], np.cumsum(self.counts * self.rows)])

    def starts(self, groups: Ints) -> Ints:
        """Return the first row of each of `groups`; for `num_groups` the number of rows."""
        run = np.minimum(np.searchsorted(self._first_group, groups, side="right") - 1, len(self.counts) - 1)
        return np.asarray(self._first_row[run] + (groups - self._first_group[run]) * self.rows[run])

    def groups_of(self, rows: Ints) -> Ints:
        """Return the row group that holds each of `rows`."""
        run = np.searchsorted(self._first_row, rows, side="right") - 1
        return np.asarray(self._first_group[run] + (rows - self._first_row[run]) // self.rows[run])

    @cached_property
    def is_regular(self) -> NDArray[np.bool_]:
        """(R,) True for runs of the largest groups, whose numbers of rows need no table."""
        return np.asarray(self.rows == self.rows.max())

    def among(self, is_chosen: NDArray[np.bool_], places: Ints) -> Ints:
        """Return the numbers of the row groups at `places` among those of the chosen runs."""
        first = np.concatenate([[0], np.cumsum(self.counts[is_chosen])])
        run = np.searchsorted(first, places, side="right") - 1
        return np.asarray(self._first_group[:-1][is_chosen][run] + places - first[run])


def permuted(places: Ints, size: int, key: Sequence[int]) -> Ints:
    """Return where a keyed permutation of range(size) takes `places`: a Feistel network over a rectangle.

    The rectangle has at least `size` cells; a result outside range(size) is permuted again until it lies inside.
    """
    if size <= 1:
        return places.copy()
    width = int(np.ceil(np.sqrt(size)))
    height = -(-size // width)
    round_keys = SeedSequence(list(key)).generate_state(6, np.uint64)
    found = np.asarray(places, dtype=np.int64).copy()
    left = np.arange(len(found))
    while len(left):
        high, low = np.divmod(found[left], width)
        for number, round_key in enumerate(round_keys):
            if number % 2:
                low = (low + _hashed(high, round_key, width)) % width
            else:
                high = (high + _hashed(low, round_key, height)) % height
        found[left] = high * width + low
        left = left[found[left] >= size]
    return found


def _hashed(values: Ints, key: np.uint64, size: int) -> Ints:
    """Return splitmix64 of each value under a key, in range(size)."""
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((mixed ^ (mixed >> np.uint64(31))) % np.uint64(size)).astype(np.int64)


@dataclass(frozen=True)
class PlannedSet:
    """One data set as the plan sees it.

    Attributes:
        digest: of its manifest, hexadecimal.
        groups: its row groups; of a selection of rows, the selected rows in each.
        group_bytes: mean bytes of a row group in storage.
        weight: its share of an epoch, relative to the others; None for its own number of rows.
    """

    digest: str
    groups: RowGroups
    group_bytes: float = 1.0
    weight: float | None = None

    def num_pools(self, pool_bytes: int) -> int:
        """Return the number of pools of about `pool_bytes` in an epoch, each of whole row groups."""
        per_pool = max(1, int(pool_bytes / max(self.group_bytes, 1e-9)))
        return -(-self.groups.num_groups // per_pool)


class SetEpoch:
    """One epoch of one data set: pools of permuted row groups, and rows shuffled inside each pool.

    Row groups of the largest size and shorter ones are permuted apart and dealt out evenly, so that the number of
    records before a pool follows from its number and the few short groups.
    """

    def __init__(self, part: PlannedSet, num_pools: int, entropy: Sequence[int]) -> None:
        self.num_pools = num_pools
        self._groups = part.groups
        self._entropy = [*entropy, int(part.digest[:16], 16)]
        groups, is_regular = part.groups, part.groups.is_regular
        self._num_regular = int(groups.counts[is_regular].sum())
        self._num_short = groups.num_groups - self._num_regular
        places = permuted(np.arange(self._num_short), self._num_short, [*self._entropy, 1])
        self._short = groups.among(~is_regular, places)
        sizes = groups.starts(self._short + 1) - groups.starts(self._short)
        self._short_rows = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._regular_rows = int(groups.rows.max())

    def _edges(self, pool: int) -> tuple[int, int]:
        """Return how many groups of the largest size and how many shorter ones come before a pool."""
        return pool * self._num_regular // self.num_pools, -(-pool * self._num_short // self.num_pools)

    def start(self, pool: int) -> int:
        """Return the number of records before a pool; of `num_pools`, all of them."""
        regular, short = self._edges(pool)
        return regular * self._regular_rows + int(self._short_rows[short])

    def pool_at(self, index: int) -> int:
        """Return the pool that holds the record at `index` of the epoch."""
        return bisect_right(range(self.num_pools), index, key=self.start) - 1

    def rows(self, pool: int) -> Ints:
        """Return the rows of a pool in the order of the epoch."""
        (first, short), (last, short_last) = self._edges(pool), self._edges(pool + 1)
        places = permuted(np.arange(first, last), self._num_regular, [*self._entropy, 0])
        regular = self._groups.among(self._groups.is_regular, places)
        groups = np.concatenate([regular, self._short[short:short_last]])
        starts, ends = self._groups.starts(groups), self._groups.starts(groups + 1)
        sizes = ends - starts
        offsets = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(starts, sizes) + offsets
        return np.asarray(default_rng([*self._entropy, 2, pool]).permutation(rows))


@dataclass(frozen=True)
class Mix:
    """The data set at each position of an epoch of the mix, by Bresenham's line, one set against the rest.

    Attributes:
        counts: records of each data set in an epoch.
        phases: offset of each line, in [0, number of positions that are left to it).
    """

    counts: tuple[int, ...]
    phases: tuple[int, ...]

    def locate(self, positions: Ints) -> tuple[NDArray[np.int32], Ints]:
        """Return the data set at each position, and how many of its records come before in the epoch."""
        source = np.full(len(positions), len(self.counts) - 1, dtype=np.int32)
        index, left = positions.copy(), np.arange(len(positions))
        for number, count in enumerate(self.counts[:-1]):
            place, total = index[left], sum(self.counts[number:])
            before = _scaled(place, count, self.phases[number], total)
            is_own = _scaled(place + 1, count, self.phases[number], total) > before
            source[left[is_own]] = number
            index[left] = np.where(is_own, before, place - before)
            left = left[~is_own]
        return source, index

    def positions(self, source: int, index: Ints) -> Ints:
        """Return the position in the epoch of the records that have `index` records of the same data set before."""
        found = index
        for number in reversed(range(min(source + 1, len(self.counts) - 1))):
            count, total = self.counts[number], sum(self.counts[number:])
            phase = self.phases[number]
            if number < source:
                count, phase = total - count, total - 1 - phase
            found = -_scaled(found + 1, -total, phase, count) - 1
        return found

    def before(self, source: int, position: int) -> int:
        """Return how many records of a data set stand before a position of the epoch."""
        for number in range(min(source + 1, len(self.counts) - 1)):
            total = sum(self.counts[number:])
            own = (position * self.counts[number] + self.phases[number]) // max(total, 1)
            position = own if number == source else position - own
        return position


def _scaled(values: Ints, factor: int, offset: int, divisor: int) -> Ints:
    """Return floor((values * factor + offset) / divisor), exact beyond 64 bits too."""
    is_large = len(values) and int(values.max()) * abs(factor) + offset >= 2**63
    wide = values.astype(object) if is_large else values
    return np.asarray((wide * factor + offset) // divisor, dtype=np.int64)


@dataclass(frozen=True)
class Refs:
    """Records by data set and row; both are PADDING where a short last batch is filled up.

    Attributes:
        source: (N,) int32, place of the data set in the plan.
        row: (N,) int64, row of that data set in storage order.
    """

    source: NDArray[np.int32]
    row: Ints


@dataclass(frozen=True)
class Window:
    """A pool of one data set: what one task reads.

    Attributes:
        source: place of the data set in the plan.
        epoch: of that data set's own endless order.
        pool: number of the pool in that epoch.
    """

    source: int
    epoch: int
    pool: int


@dataclass(frozen=True)
class Placed:
    """The records of a window that a run takes, in the order in which it takes them.

    Attributes:
        row: (N,) row of the data set in storage order.
        step: (N,) optimizer step of the run.
        slot: (N,) place in that step's global batch, in [0, global_batch_size).
    """

    row: Ints
    step: Ints
    slot: Ints


@dataclass(frozen=True)
class Plan:
    """Every record of every step of a run; holds no table of records.

    Attributes:
        num_epochs: length of the run; > 0.
        pool_bytes: bytes in storage of the row groups that are shuffled together.
        tail: what becomes of an epoch's last short batch: "drop" it, "pad" it with masked records, or "carry" it over
            into the next epoch's first batch.
        max_steps: number of steps in place of `num_epochs`, or None.
    """

    sets: tuple[PlannedSet, ...]
    seed: int
    global_batch_size: int
    num_epochs: float
    pool_bytes: int
    tail: Tail = "drop"
    max_steps: int | None = None
    _epochs: dict[tuple[int, int], SetEpoch] = field(default_factory=dict, init=False, compare=False, repr=False)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Records of each data set in an epoch, which has as many as all of them hold; by largest remainders."""
        rows = [part.groups.num_rows for part in self.sets]
        if all(part.weight is None for part in self.sets):
            return tuple(rows)
        weights = np.array([part.weight or own for part, own in zip(self.sets, rows, strict=True)], dtype=float)
        exact = weights / weights.sum() * sum(rows)
        counts = np.floor(exact).astype(np.int64)
        for place in np.argsort(counts - exact, kind="stable")[: sum(rows) - counts.sum()]:
            counts[place] += 1
        return tuple(int(count) for count in counts)

    @property
    def samples_per_epoch(self) -> int:
        """Records of an epoch, before its tail is dropped or filled up."""
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch; of a carried tail, those that the first epoch touches."""
        whole, rest = divmod(self.samples_per_epoch, self.global_batch_size)
        return whole + (1 if rest and self.tail != "drop" else 0)

    @cached_property
    def num_steps(self) -> int:
        """Optimizer steps of the run; the last fraction of a batch is left out."""
        if self.max_steps is not None:
            return self.max_steps
        if self.tail == "carry":
            return int(self.samples_per_epoch * self.num_epochs) // self.global_batch_size
        return int(self.steps_per_epoch * self.num_epochs)

    def epoch_of(self, step: int) -> int:
        """Return the epoch that a step's first record belongs to."""
        if self.tail == "carry":
            return step * self.global_batch_size // self.samples_per_epoch
        return step // self.steps_per_epoch

    def epoch_ends(self) -> list[int]:
        """Return the numbers of steps after which each epoch has been seen whole; the end of the run is the last."""
        size, num_samples = self.global_batch_size, self.samples_per_epoch
        ends: list[int] = []
        epoch = 0
        while not ends or ends[-1] < self.num_steps:
            epoch += 1
            end = -(-epoch * num_samples // size) if self.tail == "carry" else epoch * self.steps_per_epoch
            ends.append(min(end, self.num_steps))
        return ends

    def _start(self, step: int) -> int:
        """Return the position of a step's first record in the endless sequence of all epochs."""
        if self.tail == "carry":
            return step * self.global_batch_size
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch * self.samples_per_epoch + place * self.global_batch_size

    def _end(self, step: int) -> int:
        """Return the position after the last record of the step before `step`, which is at least 1."""
        end = self._start(step - 1) + self.global_batch_size
        if self.tail == "carry":
            return end
        return min(end, ((step - 1) // self.steps_per_epoch + 1) * self.samples_per_epoch)

    def _mix(self, epoch: int) -> Mix:
        if len(self.counts) == 1:
            return Mix(self.counts, ())
        rng = default_rng([self.seed, epoch, len(self.counts)])
        totals = [sum(self.counts[number:]) for number in range(len(self.counts) - 1)]
        return Mix(self.counts, tuple(int(rng.integers(total)) if total else 0 for total in totals))

    def _set_epoch(self, source: int, epoch: int) -> SetEpoch:
        if (source, epoch) not in self._epochs:
            for old in [key for key in self._epochs if key[0] == source and abs(key[1] - epoch) > 1]:
                del self._epochs[old]
            part = self.sets[source]
            self._epochs[source, epoch] = SetEpoch(part, part.num_pools(self.pool_bytes), [self.seed, epoch])
        return self._epochs[source, epoch]

    def _position(self, source: int, index: Ints) -> Ints:
        """Return the positions in the endless sequence of the records at `index` of a data set's endless order."""
        epochs, offsets = np.divmod(index, self.counts[source])
        found = np.empty_like(index)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):  # np.unique imports numpy.ma: 10 ms of a first window
            mask = epochs == epoch
            found[mask] = self._mix(epoch).positions(source, offsets[mask]) + epoch * self.samples_per_epoch
        return found

    def _index(self, source: int, position: int) -> int:
        """Return how many records of a data set stand before a position of the endless sequence."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        return epoch * self.counts[source] + self._mix(epoch).before(source, offset)

    @cached_property
    def num_windows(self) -> int:
        """Number of windows of the whole run, counted in whole epochs of each data set."""
        if not self.num_steps:
            return 0
        num_epochs = -(-self._end(self.num_steps) // self.samples_per_epoch)
        return sum(
            part.num_pools(self.pool_bytes) * -(-count * num_epochs // part.groups.num_rows)
            for part, count in zip(self.sets, self.counts, strict=True)
        )

    def windows(self, start_step: int = 0, end_step: int | None = None) -> Iterator[Window]:
        """Yield the windows that hold the records of the steps [start_step, end_step), one by one.

        A run that starts later reads the same windows from the one on that holds its first record.
        """
        end_step = self.num_steps if end_step is None else end_step
        if start_step >= end_step:
            return
        first, last = self._start(start_step), self._end(end_step)
        for _, _, window in heapq.merge(*(self._windows_of(s, first, last) for s in range(len(self.sets)))):
            yield window

    def _windows_of(self, source: int, first: int, last: int) -> Iterator[tuple[int, int, Window]]:
        index, end, num_rows = self._index(source, first), self._index(source, last), self.sets[source].groups.num_rows
        while index < end:
            epoch, offset = divmod(index, num_rows)
            order = self._set_epoch(source, epoch)
            pool = order.pool_at(offset)
            start = epoch * num_rows + order.start(pool)
            yield int(self._position(source, np.array([start]))[0]), source, Window(source, epoch, pool)
            index = epoch * num_rows + order.start(pool + 1)

    def records(self, window: Window, start_step: int = 0, end_step: int | None = None) -> Placed:
        """Return the records of a window that belong to the steps [start_step, end_step)."""
        end_step = self.num_steps if end_step is None else end_step
        order, size = self._set_epoch(window.source, window.epoch), self.global_batch_size
        row = order.rows(window.pool)
        first = window.epoch * self.sets[window.source].groups.num_rows + order.start(window.pool)
        position = self._position(window.source, np.arange(first, first + len(row)))
        if self.tail == "carry":
            step, slot = np.divmod(position, size)
            is_dropped = np.zeros(len(row), dtype=bool)
        else:
            epoch, offset = np.divmod(position, self.samples_per_epoch)
            place, slot = np.divmod(offset, size)
            step, is_dropped = epoch * self.steps_per_epoch + place, place >= self.steps_per_epoch
        kept = ~is_dropped & (step >= start_step) & (step < end_step)
        return Placed(row[kept], step[kept], slot[kept])

    def sources(self, step: int) -> NDArray[np.int32]:
        """Return the data set of every slot of a step, (global_batch_size,), PADDING where it is filled up."""
        positions = self._start(step) + np.arange(self.global_batch_size)
        epochs, offsets = np.divmod(positions, self.samples_per_epoch)
        found = np.full(self.global_batch_size, PADDING, dtype=np.int32)
        last = int(epochs[-1]) if self.tail == "carry" else int(epochs[0])
        for epoch in range(int(epochs[0]), last + 1):
            mask = epochs == epoch
            found[mask] = self._mix(epoch).locate(offsets[mask])[0]
        return found

    def refs(self, first_step: int, last_step: int) -> Refs:
        """Return the records of the steps [first_step, last_step), one step after another, rank after rank in each."""
        size = self.global_batch_size
        source = np.full((last_step - first_step) * size, PADDING, dtype=np.int32)
        row = np.full(len(source), PADDING, dtype=np.int64)
        for window in self.windows(first_step, last_step):
            records = self.records(window, first_step, last_step)
            place = (records.step - first_step) * size + records.slot
            source[place], row[place] = window.source, records.row
        return Refs(source, row)


def rank_slice(num_rows: int, rank: int, world_size: int) -> slice:
    """Return the rows of one rank out of `num_rows`: contiguous, equal where they divide, else differing by one."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)


def shuffle_quality(plan: Plan) -> dict[str, float]:
    """Measure how far the order of the first data set's records in the first epoch is from that in storage.

    Returns:
        mean_distance: mean of |place in the epoch - place in storage|, as a share of the epoch; 1/3 for a uniform
            permutation of all rows, 0 for none.
        neighbours_together: share of records that stand in the same step as the record stored after them; for a uniform
            permutation about global_batch_size / num_rows.
        row_groups_per_step: mean number of row groups that a step draws from.
    """
    refs = plan.refs(0, plan.steps_per_epoch)
    place = np.flatnonzero(refs.source == 0)
    row, step = refs.row[place], place // plan.global_batch_size
    steps = np.full(plan.sets[0].groups.num_rows, -1)
    steps[row] = step
    groups = plan.sets[0].groups.groups_of(row)
    pairs = np.unique(step * (groups.max() + 1) + groups)
    return {
        "mean_distance": float(np.abs(np.arange(len(row)) - row).mean() / len(row)),
        "neighbours_together": float(((steps[1:] == steps[:-1]) & (steps[1:] >= 0)).sum() / max(len(steps) - 1, 1)),
        "row_groups_per_step": len(pairs) / len(np.unique(step)),
    }
