"""Covariates that predict labels and errors."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.planted_bias import plant
from tinyemo.measures.spurious import bins_of, bins_test, find_spurious, predicts_label


@pytest.mark.parametrize("seed", range(3))
def test_the_test_over_bins_is_pearsons(seed) -> None:
    """In one stratum it is chi-squared times (N - 1) / N: the variance is that of the permutations."""
    rng = np.random.default_rng(seed)
    bins, label = rng.integers(5, size=300), rng.integers(3, size=300)
    table = np.histogram2d(bins, label, bins=(5, 3))[0]
    chi2, _, degrees, _ = stats.chi2_contingency(table, correction=False)
    reference = stats.chi2.sf(chi2 * 299 / 300, degrees)
    assert bins_test(np.eye(3)[:, 1:][label], bins, np.zeros(300, int), None) == pytest.approx(reference, abs=1e-9)


@pytest.mark.parametrize("images_per_author", [1, 5])
def test_the_test_over_bins_holds_its_level(images_per_author) -> None:
    rng, rejected = np.random.default_rng(5), 0
    author = np.arange(400) // images_per_author
    for _ in range(300):
        bins = rng.integers(5, size=author[-1] + 1)[author]
        outcome = rng.normal(size=author[-1] + 1)[author] + rng.normal(size=400) < 0
        clusters = author if images_per_author > 1 else None
        rejected += bins_test(outcome[:, None].astype(float), bins, rng.integers(3, size=400), clusters) <= 0.05
    assert rejected <= 26  # 15 are expected at 5 %


def test_bins_hold_about_equal_counts() -> None:
    assert np.bincount(bins_of(np.random.default_rng(0).normal(size=1000))).tolist() == [200] * 5
    assert bins_of(np.full(10, 3.0)).max() == 0


def test_dark_images_that_are_taken_for_others_are_found() -> None:
    found = {(one.group, one.metric): one for one in find_spurious(plant("brightness", seed=0).data)}
    assert found["brightness", "error"].p < 1e-20
    assert found["brightness", "error"].effect < -0.2
    assert min(one.p for key, one in found.items() if key != ("brightness", "error")) > 0.001


def test_covariates_alone_tell_the_label_where_they_hold_it() -> None:
    data = plant("none", seed=0, num_images=1500).data
    assert predicts_label(data)["label"] == pytest.approx(1 / 8, abs=0.04)
    data.covariates["brightness"] = data.label + np.random.default_rng(0).normal(size=1500) * 0.1
    assert predicts_label(data)["label"] > 0.7
