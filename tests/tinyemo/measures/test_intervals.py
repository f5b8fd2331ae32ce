"""Intervals against statsmodels and scipy, and how often they cover the truth in a simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from tinyemo.measures.accuracy import Outcomes, measure
from tinyemo.measures.intervals import (
    MAX_GROUPS,
    bootstrap_weights,
    group_clusters,
    percentile_interval,
    wilson_interval,
)

NUM_REPETITIONS = 1000


@given(trials=st.integers(1, 10_000), share=st.floats(0, 1), level=st.sampled_from([0.8, 0.95, 0.99]))
@settings(deadline=None)
def test_wilson_is_that_of_statsmodels(trials: int, share: float, level: float) -> None:
    successes = round(trials * share)
    low, high = wilson_interval([successes], [trials], level)
    wanted = proportion_confint(successes, trials, alpha=1 - level, method="wilson")
    assert (low[0], high[0]) == pytest.approx(wanted, abs=1e-9)


def test_the_bootstrap_agrees_with_scipy() -> None:
    """Of many resamples and many clusters; the two draw at random, so they agree to a hundredth of the width."""
    values = np.random.default_rng(0).exponential(size=400)
    samples = bootstrap_weights(400, 20_000, seed=1) @ values / 400
    low, high = percentile_interval(samples[:, None], 400)
    found = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert low[0] == pytest.approx(found.low, abs=0.02 * (found.high - found.low))
    assert high[0] == pytest.approx(found.high, abs=0.02 * (found.high - found.low))


def test_weights_draw_as_many_clusters_as_there_are() -> None:
    weights = bootstrap_weights(50, 4000, seed=3)
    assert (weights.sum(axis=1) == 50).all()
    # A cluster is drawn Binomial(50, 1/50) times.
    assert weights.mean() == 1
    assert weights.var() == pytest.approx(1 - 1 / 50, rel=0.02)


def test_many_clusters_are_put_together_without_splitting_one() -> None:
    clusters = np.repeat(np.arange(3 * MAX_GROUPS), 2)
    groups, num_groups, num_clusters = group_clusters(clusters, len(clusters), seed=0)
    assert (num_groups, num_clusters) == (MAX_GROUPS, 3 * MAX_GROUPS)
    assert (groups[::2] == groups[1::2]).all()
    assert set(np.bincount(groups)) == {6}


def test_a_measure_that_is_missing_everywhere_has_no_limits() -> None:
    samples = np.column_stack([np.arange(100.0), np.full(100, np.nan)])
    low, high = percentile_interval(samples, 30)
    assert np.isnan([low[1], high[1]]).all()
    assert 0 <= low[0] < high[0] <= 99


def outcomes_from(truth: np.ndarray, rng: np.random.Generator) -> Outcomes:
    """Return outcomes of two labels: rows are right with probability `truth`, of which the classifier is aware."""
    is_wrong = rng.uniform(size=len(truth)) > truth
    targets = np.arange(len(truth)) % 2
    confidences = np.full(len(truth), 0.7)
    return Outcomes(targets, targets ^ is_wrong, is_wrong.astype(np.int64), confidences, 2)


def coverage(num_clusters: int, rows_per_cluster: int, metric: str) -> float:
    """Return how often the interval holds the accuracy, 0.7, that clusters of rows have on average."""
    rng = np.random.default_rng(num_clusters)
    truth, num_covered = (0.0 if metric == "expected_calibration_error" else 0.7), 0
    clusters = np.repeat(np.arange(num_clusters), rows_per_cluster)
    for repetition in range(NUM_REPETITIONS):
        # Beta(7, 3): accuracy of a cluster, mean 0.7; with one row a cluster the rows are independent.
        outcomes = outcomes_from(np.repeat(rng.beta(7, 3, num_clusters), rows_per_cluster), rng)
        chosen = None if rows_per_cluster == 1 else clusters
        found = measure(outcomes, ("no", "yes"), chosen, num_resamples=400, seed=repetition).metrics[metric]
        assert found.low is not None
        assert found.high is not None
        num_covered += found.low <= truth <= found.high
    return num_covered / NUM_REPETITIONS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_clusters", "rows_per_cluster", "metric"),
    [
        (150, 1, "top1_accuracy"),
        (150, 1, "balanced_accuracy"),
        (60, 8, "top1_accuracy"),
        (12, 20, "top1_accuracy"),
        (60, 8, "balanced_accuracy"),
        (150, 1, "expected_calibration_error"),
    ],
)
def test_intervals_cover_at_their_rate(num_clusters: int, rows_per_cluster: int, metric: str) -> None:
    """1,000 repetitions of a rate of 0.95 lie within 0.95 +- 0.02 but for one case in 300."""
    assert coverage(num_clusters, rows_per_cluster, metric) == pytest.approx(0.95, abs=0.02)


def test_intervals_of_rows_that_are_not_independent_cover_too_seldom_without_clusters() -> None:
    """The simulation can tell right intervals from wrong ones."""
    rng, num_covered = np.random.default_rng(0), 0
    for _ in range(300):
        outcomes = outcomes_from(np.repeat(rng.beta(7, 3, 20), 50), rng)
        found = measure(outcomes, ("no", "yes"), num_resamples=2).metrics["top1_accuracy"]
        assert found.low is not None
        assert found.high is not None
        num_covered += found.low <= 0.7 <= found.high
    assert num_covered / 300 < 0.8
