"""Pairs of 64-bit hashes that differ in few bits, without comparing all with all.

Multi-index hashing (arXiv 1307.2982): two hashes that differ in at most r bits agree up to r // 4 bits in at least one
of their four 16-bit bands. So each band is looked up with every flip of that many bits, and only what is found there is
compared whole.

Q queries, B base hashes.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

BAND_BITS = 16
NUM_BANDS = 4
MAX_BITS = 11
"""Beyond this a band had to be looked up with three flipped bits, 697 times."""
PAIRS_AT_ONCE = 2**20
"""Candidates in memory at the same time: about 40 MiB."""


def nearest_within(
    queries: NDArray[np.uint64], base: NDArray[np.uint64], max_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each query the place in `base` of the nearest hash, and how many bits they differ in.

    Args:
        queries: (Q,) hashes.
        base: (B,) hashes.
        max_bits: a hash that differs in more bits is not near, 0 to MAX_BITS.

    Returns:
        (Q,) places, -1 where no hash is near, the first of those equally near; (Q,) bits, -1 where none is near.
    """
    if not 0 <= max_bits <= MAX_BITS:
        raise ValueError(f"max_bits is {max_bits}, it must be 0 to {MAX_BITS}")
    # Distance and place in one number, so that the smallest is the nearest, then the first.
    best = np.full(len(queries), np.iinfo(np.int64).max)
    for band in range(NUM_BANDS):
        shift = np.uint64(band * BAND_BITS)
        query_keys = (queries >> shift).astype(np.uint16)
        base_keys = (base >> shift).astype(np.uint16)
        order = np.argsort(base_keys, kind="stable")
        base_keys = base_keys[order]
        for flip in _flips(max_bits // NUM_BANDS):
            first = np.searchsorted(base_keys, query_keys ^ flip, side="left")
            last = np.searchsorted(base_keys, query_keys ^ flip, side="right")
            _compare(queries, base, order, first, last, max_bits, best)
    is_near = best < np.iinfo(np.int64).max
    places, bits = np.full(len(queries), -1), np.full(len(queries), -1)
    bits[is_near], places[is_near] = np.divmod(best[is_near], max(len(base), 1))
    return places, bits


def _flips(num_bits: int) -> NDArray[np.uint16]:
    masks = [sum(1 << bit for bit in bits) for n in range(num_bits + 1) for bits in combinations(range(BAND_BITS), n)]
    return np.array(masks, dtype=np.uint16)


def _compare(
    queries: NDArray[np.uint64],
    base: NDArray[np.uint64],
    order: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    max_bits: int,
    best: NDArray[np.int64],
) -> None:
    """Compare query i with base[order[first[i]:last[i]]]; `best` gets what is nearer than what it holds."""
    counts = last - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(queries):
        pairs_before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, pairs_before + PAIRS_AT_ONCE, side="right")))
        part = slice(start, stop)
        query = np.repeat(np.arange(start, stop), counts[part])
        offset = np.arange(len(query)) - np.repeat(ends[part] - counts[part] - pairs_before, counts[part])
        place = order[np.repeat(first[part], counts[part]) + offset]
        bits = np.bitwise_count(queries[query] ^ base[place]).astype(np.int64)
        is_near = bits <= max_bits
        np.minimum.at(best, query[is_near], bits[is_near] * len(base) + place[is_near])
        start = stop
