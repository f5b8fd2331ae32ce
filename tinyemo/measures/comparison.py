"""Paired comparison of two classifiers on the same images, and the smallest difference that it could have seen.

Shape letters: N images, K clusters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyemo.measures.intervals import NUM_RESAMPLES, bootstrap_weights, group_clusters, percentile_interval

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class PairedAccuracy:
    """How much more often the first classifier is right than the second.

    Attributes:
        num_images: N.
        num_clusters: K.
        difference: accuracy of the first less that of the second, in [-1, 1].
        low, high: limits of its interval, by a bootstrap over clusters.
        p_mcnemar: two-sided mid-p of McNemar's test, which takes images for independent.
        smallest_detectable: difference that the comparison finds with the given power, in [0, 1]; None where the two
            never differ in an image, or there is one cluster.
    """

    num_images: int
    num_clusters: int
    difference: float
    low: float
    high: float
    p_mcnemar: float
    smallest_detectable: float | None


def compare_accuracy(
    first: Bools,
    second: Bools,
    clusters: NDArray[Any] | Sequence[str] | None = None,
    *,
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
    power: float = 0.8,
    seed: int = 0,
) -> PairedAccuracy:
    """Compare which images two classifiers label right.

    Args:
        first: (N,) whether the first one is right.
        second: (N,) whether the second one is, image by image.
        clusters: (N,) cluster of each image; None where each is its own.
        num_resamples: of the bootstrap.
        level: of the interval, and 1 less the level of the test behind `smallest_detectable`.
        power: chance to find a difference as large as `smallest_detectable`.
        seed: of the resamples.
    """
    assert len(first) == len(second) > 0
    groups, num_groups, num_clusters = group_clusters(clusters, len(first), seed)
    gains = first.astype(np.float64) - second
    sums = np.stack([np.bincount(groups, gains, num_groups), np.bincount(groups, minlength=num_groups)], axis=1)
    drawn = bootstrap_weights(num_groups, num_resamples, seed) @ sums
    low, high = percentile_interval(drawn[:, :1] / drawn[:, 1:], num_groups, level)
    return PairedAccuracy(
        num_images=len(first),
        num_clusters=num_clusters,
        difference=float(gains.mean()),
        low=float(low[0]),
        high=float(high[0]),
        p_mcnemar=mcnemar_p(first, second),
        smallest_detectable=smallest_detectable(standard_error(sums[:, 0], sums[:, 1]), 1 - level, power),
    )


def mcnemar_p(first: Bools, second: Bools, *, is_mid_p: bool = True) -> float:
    """Return the two-sided p of McNemar's exact test; 1 where the two never differ.

    The exact test is conservative; its mid-p is not, and keeps its level (Fagerland et al., 2013,
    doi 10.1186/1471-2288-13-91).
    """
    from scipy import stats

    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    fewer, both = min(only_first, only_second), only_first + only_second
    if both == 0:
        return 1.0
    if is_mid_p:
        tail = stats.binom.cdf(fewer, both, 0.5) - stats.binom.pmf(fewer, both, 0.5) / 2
    else:
        tail = stats.binom.cdf(fewer, both, 0.5)
    return min(1.0, float(2 * tail))


def standard_error(sums: NDArray[Any], counts: NDArray[Any]) -> float:
    """Return the standard error of a mean over rows from sums and counts of its K clusters; NaN for one cluster."""
    num_clusters = len(sums)
    if num_clusters < 2:
        return math.nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt((residuals**2).sum() * num_clusters / (num_clusters - 1)) / counts.sum())


def smallest_detectable(error: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """Return the difference that a two-sided test at level `alpha` finds with chance `power`.

    Args:
        error: standard error of the difference; None comes back where it is 0 or NaN.
    """
    from scipy import stats

    if math.isnan(error) or error == 0:
        return None
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * error)
