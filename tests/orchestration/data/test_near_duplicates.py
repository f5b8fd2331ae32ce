"""Multi-index lookup finds what comparing all with all finds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from orchestration.data import near_duplicates
from orchestration.data.near_duplicates import MAX_BITS, nearest_within


def compare_all(
    queries: NDArray[np.uint64], base: NDArray[np.uint64], max_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    bits = np.bitwise_count(queries[:, None] ^ base[None, :]).astype(np.int64)
    nearest = bits.argmin(axis=1)
    least = bits.min(axis=1)
    return np.where(least <= max_bits, nearest, -1), np.where(least <= max_bits, least, -1)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32), num_queries=st.integers(0, 60), num_base=st.integers(1, 60),
    max_bits=st.integers(0, MAX_BITS), num_flips=st.integers(0, 14), pairs_at_once=st.sampled_from([1, 7, 2**20]),
)  # fmt: skip
def test_the_nearest_hash_is_found_wherever_the_bits_differ(
    seed: int, num_queries: int, num_base: int, max_bits: int, num_flips: int, pairs_at_once: int
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2**64, num_base, dtype=np.uint64)
    base[rng.random(num_base) < 0.3] = base[0]  # equal ones: the first must win
    queries = base[rng.integers(0, num_base, num_queries)]
    for _ in range(num_flips):
        queries = queries ^ (np.uint64(1) << rng.integers(0, 64, num_queries, dtype=np.uint64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(near_duplicates, "PAIRS_AT_ONCE", pairs_at_once)
        places, bits = nearest_within(queries, base, max_bits)
    expected_places, expected_bits = compare_all(queries, base, max_bits)
    assert places.tolist() == expected_places.tolist()
    assert bits.tolist() == expected_bits.tolist()


def test_bits_spread_over_all_bands_are_found() -> None:
    """The worst case of the lookup: no band is equal in both hashes."""
    base = np.array([0], dtype=np.uint64)
    spread = np.array([0x0007_0007_0007_0003], dtype=np.uint64)  # 3 + 3 + 3 + 2 bits
    assert nearest_within(spread, base, 11)[1].tolist() == [11]
    assert nearest_within(spread, base, 10)[1].tolist() == [-1]


def test_nothing_is_near_nothing() -> None:
    some, none = np.array([1, 2], dtype=np.uint64), np.array([], dtype=np.uint64)
    assert nearest_within(some, none, 4)[0].tolist() == [-1, -1]
    assert nearest_within(none, some, 4)[0].tolist() == []


@pytest.mark.parametrize("max_bits", [-1, MAX_BITS + 1])
def test_bits_that_the_bands_cannot_find_are_refused(max_bits: int) -> None:
    hashes = np.array([1], dtype=np.uint64)
    with pytest.raises(ValueError, match="max_bits is"):
        nearest_within(hashes, hashes, max_bits)
