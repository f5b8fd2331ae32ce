"""Which record stands where in a run over instruct data: a pure function of (manifest digest, seed, epoch, position).

In an epoch the row groups of a data set are permuted, over all its shards, and rows are permuted inside pools of
`pool_rows`, so that reading a pool touches a few row groups and no more. Position `p` of the epoch belongs to step
`p // global_batch_size`. Who reads a record is decided later and changes nothing here.

Several data sets are mixed by weight: each has its own endless order, epoch after epoch, and their positions are merged
so evenly that any stretch of an epoch holds the same mix.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from orchestration.streaming.sampling import epoch_order

Tail = Literal["drop", "pad"]
PADDING = -1


@dataclass(frozen=True)
class MixedSet:
    """One data set as the plan sees it.

    Attributes:
        digest: of its manifest, hexadecimal.
        group_rows: rows of each Parquet row group, in storage order.
        weight: its share of an epoch, relative to the others'; None for its own number of rows.
    """

    digest: str
    group_rows: tuple[int, ...]
    weight: float | None = None

    @cached_property
    def num_rows(self) -> int:
        """Over all row groups."""
        return sum(self.group_rows)


@dataclass(frozen=True)
class Refs:
    """Records by data set and row; both are PADDING where a short last batch was filled up.

    Attributes:
        source: (N,) int32, place of the data set in the plan.
        row: (N,) int64, row of that data set in storage order.
    """

    source: NDArray[np.int32]
    row: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, places: slice | NDArray[np.int64]) -> Refs:
        """Some of them."""
        return Refs(self.source[places], self.row[places])


@dataclass(frozen=True)
class Window:
    """Steps [first, last) of one epoch: what one task reads."""

    epoch: int
    first: int
    last: int


@dataclass(frozen=True)
class EpochPlan:
    """What every step of a run holds.

    Attributes:
        tail: what becomes of an epoch's last short batch: dropped, or filled up with masked rows.
    """

    sets: tuple[MixedSet, ...]
    seed: int
    global_batch_size: int
    pool_rows: int
    tail: Tail = "drop"
    _orders: dict[tuple[int, int], NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)
    _merges: dict[int, tuple[NDArray[np.int32], NDArray[np.int64]]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Records of each data set in an epoch, which has as many as all of them hold; largest remainders."""
        rows = np.array([part.num_rows for part in self.sets])
        if all(part.weight is None for part in self.sets):
            return tuple(int(n) for n in rows)
        weights = np.array([part.num_rows if part.weight is None else part.weight for part in self.sets], dtype=float)
        exact = weights / weights.sum() * rows.sum()
        counts = np.floor(exact).astype(int)
        for place in np.argsort(counts - exact, kind="stable")[: rows.sum() - counts.sum()]:
            counts[place] += 1
        return tuple(int(n) for n in counts)

    @property
    def samples_per_epoch(self) -> int:
        """Records of an epoch, before its tail is dropped or filled."""
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch."""
        whole, rest = divmod(self.samples_per_epoch, self.global_batch_size)
        return whole + (1 if rest and self.tail == "pad" else 0)

    def refs(self, epoch: int, start: int, stop: int) -> Refs:
        """The records at positions [start, stop) of an epoch, padding behind its end."""
        whole = self._merged(epoch)
        source, index = whole[0][start:stop], whole[1][start:stop]
        row = np.empty(len(index), dtype=np.int64)
        for place, part in enumerate(self.sets):
            mask = source == place
            # The data set's own endless order goes on from one epoch of the mix to the next.
            own_epoch, offset = np.divmod(index[mask] + epoch * self.counts[place], part.num_rows)
            found = np.empty(len(offset), dtype=np.int64)
            for one in np.unique(own_epoch):
                found[own_epoch == one] = self._order(place, int(one))[offset[own_epoch == one]]
            row[mask] = found
        missing = stop - start - len(row)
        if missing:
            source = np.concatenate([source, np.full(missing, PADDING, dtype=np.int32)])
            row = np.concatenate([row, np.full(missing, PADDING, dtype=np.int64)])
        return Refs(source, row)

    def global_batch(self, epoch: int, step: int) -> Refs:
        """The records of a step, (global_batch_size,), rank after rank."""
        return self.steps(Window(epoch, step, step + 1))

    def steps(self, window: Window) -> Refs:
        """The records of a window's steps, one after another."""
        size = self.global_batch_size
        return self.refs(window.epoch, window.first * size, window.last * size)

    def windows(self, start_step: int, num_steps: int, window_rows: int | None = None) -> list[Window]:
        """The windows of the run's steps [start_step, num_steps), counted over epochs, cut where a fresh run cuts them.

        A window is a pool where the batch divides it; else its steps touch the pool beside it as well. With fewer
        `window_rows` a pool is read in parts, each of which touches most of its row groups.
        """
        found = []
        per_window = max(1, min(self.pool_rows, window_rows or self.pool_rows) // self.global_batch_size)
        per_epoch = self.steps_per_epoch
        for epoch in range(start_step // per_epoch if per_epoch else 0, -(-num_steps // per_epoch) if per_epoch else 0):
            first = max(0, start_step - epoch * per_epoch)
            last = min(per_epoch, num_steps - epoch * per_epoch)
            cuts = sorted({first, last, *(cut for cut in range(0, per_epoch, per_window) if first < cut < last)})
            found += [Window(epoch, a, b) for a, b in itertools.pairwise(cuts)]
        return found

    def _merged(self, epoch: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """(data set, how many of its records came before in this epoch) of every position of an epoch."""
        if epoch not in self._merges:
            rng = np.random.default_rng([self.seed, epoch, len(self.sets)])
            # The j-th record of a data set stands at about j/n of the epoch.
            keys = [(np.arange(count) + rng.random()) / count for count in self.counts if count]
            source = np.repeat(np.arange(len(self.sets), dtype=np.int32), self.counts)
            index = np.concatenate([np.arange(count, dtype=np.int64) for count in self.counts])
            order = np.argsort(np.concatenate(keys), kind="stable")
            self._merges.clear()
            self._merges[epoch] = (source[order], index[order])
        return self._merges[epoch]

    def _order(self, place: int, epoch: int) -> NDArray[np.int64]:
        if (place, epoch) not in self._orders:
            for old in [key for key in self._orders if key[0] == place and key[1] < epoch - 1]:
                del self._orders[old]
            part = self.sets[place]
            self._orders[place, epoch] = epoch_order(
                np.array(part.group_rows, dtype=np.int64),
                entropy=(self.seed, epoch, int(part.digest[:16], 16)),
                pool_rows=self.pool_rows,
            )
        return self._orders[place, epoch]


@dataclass(frozen=True)
class ShuffleQuality:
    """How far an epoch's order is from the order in storage.

    Attributes:
        mean_distance: mean of |place in the epoch - place in storage|, as a share of the epoch; 1/3 for a uniform
            permutation of all rows, 0 for none.
        neighbours_together: share of records that stand in the same step as the record stored after them; for a uniform
            permutation about global_batch_size / num_rows.
        row_groups_per_step: mean number of row groups that a step draws from.
    """

    mean_distance: float
    neighbours_together: float
    row_groups_per_step: float


def shuffle_quality(plan: EpochPlan, epoch: int = 0) -> ShuffleQuality:
    """Of the first data set's records in one epoch of the mix."""
    refs = plan.refs(epoch, 0, plan.samples_per_epoch)
    place = np.flatnonzero(refs.source == 0)
    row, step = refs.row[place], place // plan.global_batch_size
    steps = np.full(plan.sets[0].num_rows, -1)
    steps[row] = step
    groups = np.repeat(np.arange(len(plan.sets[0].group_rows)), plan.sets[0].group_rows)[row]
    pairs = np.unique(step * (groups.max() + 1) + groups)
    return ShuffleQuality(
        mean_distance=float(np.abs(np.arange(len(row)) - row).mean() / len(row)),
        neighbours_together=float(((steps[1:] == steps[:-1]) & (steps[1:] >= 0)).mean()) if len(steps) > 1 else 0.0,
        row_groups_per_step=len(pairs) / len(np.unique(step)),
    )
