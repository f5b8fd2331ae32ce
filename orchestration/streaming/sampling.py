"""Which sample stands where: a pure function of (seed, epoch, index), whoever reads it.

The samples of a run form one endless sequence: the rows of the split in the order of epoch 0, then in that of epoch
1, and so on. Optimizer step `s` takes the samples [s * B, (s + 1) * B) of it, rank `r` the r-th of `world_size` equal
slices of those. So no tail is dropped between epochs, and neither the number of workers nor a restart changes what a
step holds.

Inside an epoch the order is shuffled in two levels, so that a window of steps touches few shards of a large data set:
chunks of neighbouring rows are permuted, then rows inside pools of `pool_rows`. A split that fits into one pool is
permuted as a whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 1024


def chunks_of(num_rows: int, chunk_rows: int) -> NDArray[np.int64]:
    """Sizes of the chunks of `num_rows` rows: all of `chunk_rows` but the last, which may be shorter."""
    edges = np.append(np.arange(0, num_rows, chunk_rows), num_rows)
    return np.diff(edges).astype(np.int64)


def epoch_order(chunk_sizes: NDArray[np.int64], *, entropy: Sequence[int], pool_rows: int) -> NDArray[np.int64]:
    """Row positions of one epoch, (N,) int64, a permutation of range(N).

    Args:
        chunk_sizes: rows of each chunk of neighbouring rows, in storage order; they sum up to N.
        entropy: what the order is a function of: the seed, the epoch, and whatever else must change it; >= 0.
        pool_rows: rows that are shuffled together after the chunks were permuted.
    """
    rng = np.random.default_rng(list(entropy))
    num_rows = int(chunk_sizes.sum())
    if num_rows <= pool_rows:
        return rng.permutation(num_rows).astype(np.int64)
    ends = np.cumsum(chunk_sizes)
    chunks = [np.arange(ends[c] - chunk_sizes[c], ends[c]) for c in rng.permutation(len(chunk_sizes))]
    order = np.concatenate(chunks).astype(np.int64)
    for start in range(0, num_rows, pool_rows):
        rng.shuffle(order[start : start + pool_rows])
    return order


@dataclass(frozen=True)
class SampleOrder:
    """The endless sequence of row positions of one split."""

    num_rows: int
    seed: int
    pool_rows: int = 65_536
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, compare=False, repr=False)

    def positions(self, start: int, stop: int) -> NDArray[np.int64]:
        """Row positions of the samples [start, stop) of the sequence, (stop - start,) int64."""
        index = np.arange(start, stop, dtype=np.int64)
        epochs, offsets = np.divmod(index, self.num_rows)
        out = np.empty_like(index)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            out[mask] = self._epoch(int(epoch))[offsets[mask]]
        return out

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            # Two epochs are enough: a window of steps crosses one boundary at most, or is longer than an epoch.
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            chunk_sizes = chunks_of(self.num_rows, CHUNK_ROWS)
            self._epochs[epoch] = epoch_order(chunk_sizes, entropy=(self.seed, epoch), pool_rows=self.pool_rows)
        return self._epochs[epoch]


@dataclass(frozen=True)
class TrainPlan:
    """What every optimizer step of a run holds."""

    order: SampleOrder
    global_batch_size: int
    num_epochs: float

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run; the last fraction of a batch is left out, never padded."""
        return int(self.order.num_rows * self.num_epochs) // self.global_batch_size

    def global_batch(self, step: int) -> NDArray[np.int64]:
        """Row positions of one optimizer step, (global_batch_size,) int64, rank after rank."""
        start = step * self.global_batch_size
        return self.order.positions(start, start + self.global_batch_size)

    def steps_of_epoch_ends(self) -> list[int]:
        """Number of steps after which each epoch has been seen whole, in order; the run's end stands for the last."""
        ends = []
        for epoch in range(1, int(np.ceil(self.num_epochs)) + 1):
            ends.append(min(-(-epoch * self.order.num_rows // self.global_batch_size), self.num_steps))
        return sorted(set(ends))

    def windows(self, start_step: int, steps_per_window: int) -> list[tuple[int, int]]:
        """Step ranges [first, last) from `start_step` to the end, cut where a fresh run would cut them."""
        cuts = [start_step, *range(0, self.num_steps, steps_per_window), self.num_steps]
        edges = sorted({cut for cut in cuts if cut >= start_step})
        return list(itertools.pairwise(edges))


def rank_slice(num_rows: int, rank: int, world_size: int) -> slice:
    """The rows of one rank out of `num_rows`: contiguous, equal where they divide, else differing by one."""
    return slice(num_rows * rank // world_size, num_rows * (rank + 1) // world_size)
