"""Paired comparisons against statsmodels, and the stated power in a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.contingency_tables import mcnemar

from tinyemo.measures.comparison import compare_accuracy, mcnemar_p, smallest_detectable, standard_error


def pairs(only_first: int, only_second: int, both: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.repeat([True, False, True], [only_first, only_second, both])
    return first, np.repeat([False, True, True], [only_first, only_second, both])


@given(only_first=st.integers(0, 300), only_second=st.integers(0, 300), both=st.integers(1, 50))
@settings(deadline=None)
def test_mcnemar_is_that_of_statsmodels(only_first: int, only_second: int, both: int) -> None:
    first, second = pairs(only_first, only_second, both)
    table = [[both, only_first], [only_second, 0]]
    assert mcnemar_p(first, second, is_mid_p=False) == pytest.approx(mcnemar(table, exact=True).pvalue, abs=1e-9)
    assert mcnemar_p(first, second) <= mcnemar_p(first, second, is_mid_p=False)


def test_mid_p_of_a_table_worked_out_by_hand() -> None:
    """1 against 5 of 6: the exact p is 2 (1 + 6) / 64, and the mid-p counts half of the 6."""
    assert mcnemar_p(*pairs(1, 5, 9)) == pytest.approx(2 * (1 + 3) / 64)


def test_the_standard_error_of_single_rows_is_the_textbook_one() -> None:
    values = np.random.default_rng(1).normal(size=60)
    assert standard_error(values, np.ones(60)) == pytest.approx(values.std(ddof=1) / np.sqrt(60), abs=1e-12)


def test_a_model_compared_with_itself_shows_no_difference() -> None:
    first = np.random.default_rng(2).uniform(size=90) < 0.6
    found = compare_accuracy(first, first)
    assert (found.difference, found.low, found.high, found.p_mcnemar, found.smallest_detectable) == (0, 0, 0, 1, None)


@pytest.mark.slow
def test_a_difference_as_large_as_the_smallest_detectable_is_found_at_the_stated_rate() -> None:
    rng, num_rows = np.random.default_rng(7), 800
    # Independent images: the first is right where the second is, and gains and loses some beside.
    loss, base = 0.06, 0.6

    def draw(difference: float) -> tuple[np.ndarray, np.ndarray]:
        second = rng.uniform(size=num_rows) < base
        gain = (loss * base + difference) / (1 - base)
        first = np.where(second, rng.uniform(size=num_rows) >= loss, rng.uniform(size=num_rows) < gain)
        return first, second

    # The variance depends on the difference itself: find the one that is its own smallest detectable.
    difference = 0.04
    for _ in range(5):
        found = np.mean([compare_accuracy(*draw(difference), num_resamples=2).smallest_detectable for _ in range(20)])
        difference = float(found)
    num_found = 0
    for repetition in range(1000):
        tested = compare_accuracy(*draw(difference), num_resamples=300, seed=repetition)
        num_found += tested.low > 0
    assert num_found / 1000 == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
def test_the_interval_of_a_difference_covers_at_its_rate_with_clusters() -> None:
    rng, num_covered = np.random.default_rng(11), 0
    clusters = np.repeat(np.arange(50), 6)
    for repetition in range(1000):
        gain = rng.beta(2, 6, 50)[clusters]  # by cluster, mean 0.25
        second = rng.uniform(size=300) < 0.5
        first = second | (rng.uniform(size=300) < gain)
        found = compare_accuracy(first, second, clusters, num_resamples=400, seed=repetition)
        num_covered += found.low <= 0.125 <= found.high
    assert num_covered / 1000 == pytest.approx(0.95, abs=0.02)


def test_more_power_needs_a_larger_difference() -> None:
    assert smallest_detectable(0.01, power=0.9) > smallest_detectable(0.01, power=0.8)  # type: ignore[operator]
    assert smallest_detectable(float("nan")) is None
