"""Gaps between two groups of images in a measure, with clustered intervals, tests and power.

A gap is the mean of an outcome in a group less its mean in the others, taken within strata (true labels, say) and
averaged over them with the weights of Mantel and Haenszel, n_a n_b / (n_a + n_b). So a group does not look worse for
holding more of the hard labels. Intervals allow each group its own spread; tests take the spread that holds if there
is no gap.

Shape letters: N rows, S strata, K clusters, Z columns of a design.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, special, stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

LEVEL = 0.95
MAX_EXACT = 5000
"""Rows of the smaller side up to which the test of counts is exact; above it the normal approximation serves."""
NUM_BINS = 10


@dataclass(frozen=True)
class Gaps:
    """Gaps in S strata, and at the last place that over all strata; NaN where a side has no rows.

    Attributes:
        effect: (S + 1,) mean of the group less mean of the others.
        error: (S + 1,) standard error, clustered.
        low, high: (S + 1,) limits of the 95 % interval.
        p: (S + 1,) two-sided.
        num_group, num_other: (S + 1,) rows on each side.
        mean_group, mean_other: (S + 1,) means on each side; at the last place averaged with the gap's weights.
    """

    effect: Floats
    error: Floats
    low: Floats
    high: Floats
    p: Floats
    num_group: Ints
    num_other: Ints
    mean_group: Floats
    mean_other: Floats


def stratified_gap(
    outcome: NDArray[Any],
    in_group: Bools,
    strata: Ints,
    num_strata: int,
    clusters: Ints | None = None,
    *,
    without: int | None = None,
) -> Gaps:
    """Return the gaps in an outcome between a group and all other rows.

    An outcome of zeros and ones is tested by Fisher's exact test, and over strata by its stratified form (the sum of
    hypergeometric counts); with clusters the variance grows by the design effect and Student's t has as many degrees of
    freedom as the clusters amount to. Others are tested by the normal approximation, or Student's t with clusters.

    Args:
        outcome: (N,) bool or float.
        in_group: (N,) which rows belong to the group.
        strata: (N,) in [0, S).
        num_strata: S.
        clusters: (N,) number of the row's cluster; None where rows are independent.
        without: stratum to leave out of the gap over all strata.
    """
    y = outcome.astype(np.float64)
    is_binary = outcome.dtype == np.bool_
    cell = strata * 2 + in_group
    count, total, square = (
        np.bincount(cell, weights, 2 * num_strata).reshape(num_strata, 2) for weights in (None, y, y * y)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = total / count
        spread = np.maximum(square / count - mean**2, 0.0)
        rows = count.sum(1)
        pooled_mean = total.sum(1) / rows
        pooled = np.maximum(square.sum(1) - rows * pooled_mean**2, 0.0) / (rows - 1)
        own = spread / np.maximum(count - 1, 1)
        if is_binary:  # a share of 0 or 1 in a few rows does not make the error 0
            share = (total + 1) / (count + 2)
            own = np.maximum(own, share * (1 - share) / (count + 2))
        weight = count[:, 0] * count[:, 1] / rows
        null = pooled / weight  # n_a n_b / n turns the pooled variance into that of the gap
    weight = np.where((count > 0).all(1), weight, 0.0)
    if without is not None:
        weight[without] = 0.0
    effect = np.append(mean[:, 1] - mean[:, 0], _average(mean[:, 1] - mean[:, 0], weight))
    variance, null = own.sum(1), null if is_binary else np.fmax(null, own.sum(1))
    variance, null = (np.append(each, _average(each, weight, squared=True)) for each in (variance, null))
    degrees = np.full(num_strata + 1, np.inf)
    if clusters is not None:
        residual = y - np.where(rows > 0, pooled_mean, 0.0)[strata]
        leverage = np.where(in_group, 1.0, -1.0) / np.maximum(count, 1)[strata, in_group.astype(int)]
        design_effect, degrees = _clustering(leverage, residual, strata, weight, clusters)
        own_residual = y - np.nan_to_num(mean)[strata, in_group.astype(int)]
        own_effect, _ = _clustering(leverage, own_residual, strata, weight, clusters)
        variance, null = variance * own_effect, null * design_effect
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(variance)
        statistic = np.abs(effect) / np.sqrt(null)
    p = np.where(effect == 0, 1.0, 2 * stats.t.sf(statistic, degrees))
    if is_binary:
        p = _no_smaller_than_exact(p, count, total, weight, is_clustered=clusters is not None)
    half = stats.t.ppf((1 + LEVEL) / 2, degrees) * error
    sizes = [np.append(count[:, side], count[weight > 0, side].sum()).astype(np.int64) for side in (1, 0)]
    means = [np.append(mean[:, side], _average(mean[:, side], weight)) for side in (1, 0)]
    return Gaps(effect, error, effect - half, effect + half, p, sizes[0], sizes[1], means[0], means[1])


def _average(values: Floats, weight: Floats, *, squared: bool = False) -> float:
    """Return the weighted mean over strata; `squared` for variances of independent strata."""
    if not weight.any():
        return float("nan")
    kept = np.where(weight > 0, values, 0.0)
    share = weight / weight.sum()
    return float((share ** (2 if squared else 1) * kept).sum())


def _clustering(
    leverage: Floats, residual: Floats, strata: Ints, weight: Floats, clusters: Ints
) -> tuple[Floats, Floats]:
    """Return (S + 1,) design effects, at least 1, and degrees of freedom: the clusters that the gap amounts to, less 1.

    The design effect is the variance of clusters' sums over that of independent rows.
    """
    num_strata, num_clusters = len(weight), int(clusters.max()) + 1
    parts, place = np.unique(strata * num_clusters + clusters, return_inverse=True)
    parts_stratum = parts // num_clusters
    score = leverage * residual
    by_part = np.bincount(place, score) ** 2
    mass = np.bincount(place, leverage**2)
    together = np.bincount(parts_stratum, by_part, num_strata)
    apart = np.bincount(strata, score**2, num_strata)
    amount = np.bincount(parts_stratum, mass, num_strata) ** 2 / np.maximum(
        np.bincount(parts_stratum, mass**2, num_strata), 1e-300
    )
    share = (weight / max(weight.sum(), 1e-300))[strata]
    over_all = np.bincount(clusters, share * score)
    mass_over_all = np.bincount(clusters, (share * leverage) ** 2)
    together = np.append(together, (over_all**2).sum())
    apart = np.append(apart, ((share * score) ** 2).sum())
    amount = np.append(amount, mass_over_all.sum() ** 2 / max((mass_over_all**2).sum(), 1e-300))
    correction = amount / np.maximum(amount - 1, 1)
    return np.maximum(together / np.maximum(apart, 1e-300) * correction, 1.0), np.maximum(amount - 1, 1.0)


def _no_smaller_than_exact(
    p: Floats, count: NDArray[Any], total: NDArray[Any], weight: Floats, *, is_clustered: bool
) -> Floats:
    """Return exact p where a side is small enough, the larger of both with clusters."""
    found = p.copy()
    distributions, observed = [], 0
    sizes, successes, rows = count[:, 1].astype(int), total.sum(1).round().astype(int), count.sum(1).astype(int)
    for stratum in np.flatnonzero((count > 0).all(1)):
        if min(count[stratum]) > MAX_EXACT:
            continue
        low, chance = _hypergeometric(rows[stratum], successes[stratum], sizes[stratum])
        right = round(total[stratum, 1]) - low
        exact = _two_sided(chance, right)
        found[stratum] = max(exact, p[stratum]) if is_clustered else exact
        if weight[stratum] > 0 and min(count[weight > 0].sum(0)) <= MAX_EXACT:
            distributions.append(chance)
            observed += right
    if distributions and len(distributions) == (weight > 0).sum():
        whole = reduce(np.convolve, distributions)
        exact = _two_sided(whole, observed)
        found[-1] = max(exact, p[-1]) if is_clustered else exact
    return found


def _hypergeometric(rows: int, successes: int, size: int) -> tuple[int, Floats]:
    """Return the fewest successes that a group of this size can hold, and the chances of that many and more."""
    low, high = max(0, size - (rows - successes)), min(size, successes)
    k = np.arange(low, high + 1)
    log_chance = _log_choices(successes, k) + _log_choices(rows - successes, size - k) - _log_choices(rows, size)
    return low, np.exp(log_chance)


def _log_choices(n: int, k: Any) -> Any:
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def _two_sided(chances: Floats, observed: int) -> float:
    """Return twice the smaller tail."""
    return min(1.0, 2 * float(min(chances[: observed + 1].sum(), chances[observed:].sum())))


def design_of(
    categories: Sequence[Ints], numbers: Mapping[str, Floats] | None = None, *, num_bins: int = NUM_BINS
) -> sparse.csr_matrix:
    """Return an (N, Z) design: a column for each value of each category, and for each number its bins and itself.

    Args:
        categories: (N,) codes from 0 on.
        numbers: (N,) values each; each becomes bins of equal counts and a line in its standardised ranks, so that an
            effect of any shape is taken out.
        num_bins: of each number.
    """
    columns: list[Any] = []
    for codes in categories:
        columns.append(_indicators(codes))
    for values in (numbers or {}).values():
        known = np.nan_to_num(values, nan=np.nanmedian(values) if np.isfinite(values).any() else 0.0)
        edges = np.unique(np.quantile(known, np.linspace(0, 1, num_bins + 1)[1:-1]))
        columns.append(_indicators(np.searchsorted(edges, known, side="right")))
        line = known - known.mean()
        spread = line.std()
        columns.append(sparse.csr_matrix((line / spread if spread > 0 else line)[:, None]))
    return sparse.hstack(columns, format="csr")


def _indicators(codes: NDArray[Any]) -> sparse.csr_matrix:
    num_rows = len(codes)
    width = int(codes.max()) + 1
    return sparse.csr_matrix((np.ones(num_rows), codes, np.arange(num_rows + 1)), shape=(num_rows, width))


@dataclass(frozen=True)
class Adjusted:
    """A gap after the effect of a design was taken out of it; `p` is 1 where the design leaves nothing of the group."""

    effect: float
    error: float
    p: float


def adjusted_gap(
    outcome: NDArray[Any], in_group: Bools, design: sparse.csr_matrix, clusters: Ints | None = None
) -> Adjusted:
    """Return the gap of a linear model of the outcome on the group and a design, clustered.

    The estimate and, with the group's own residuals, its sandwich error are those of ordinary least squares; the test
    takes the variance that holds without a gap, like `stratified_gap`.

    Args:
        outcome: (N,) bool or float.
        in_group: (N,).
        design: (N, Z) that spans the constant, see `design_of`.
        clusters: (N,) or None.
    """
    gram = np.linalg.pinv((design.T @ design).toarray(), hermitian=True)

    def project(values: Floats) -> Floats:
        return np.asarray(design @ (gram @ (design.T @ values)))

    y, x = outcome.astype(np.float64), in_group.astype(np.float64)
    y, x = y - project(y), x - project(x)
    size = float(x @ x)
    if size < 1e-8 * max(float(in_group.sum()), 1.0):
        return Adjusted(0.0, float("nan"), 1.0)
    effect = float(x @ y) / size
    rank = round(np.trace(gram @ (design.T @ design).toarray())) + 1
    residual = y - x * effect
    correction = (len(y) - 1) / max(len(y) - rank, 1)

    def whole(scores: Floats) -> Floats:
        return scores if clusters is None else np.asarray(np.bincount(clusters, scores), np.float64)

    by_cluster = whole(x * residual)
    num_clusters = np.count_nonzero(np.bincount(clusters)) if clusters is not None else len(y)
    error = np.sqrt((by_cluster**2).sum() * num_clusters / (num_clusters - 1) * correction) / size
    independent = float((x**2 * y**2).sum())
    variance = float((x**2 * np.maximum(project(y**2), 0.0)).sum()) * correction
    if outcome.dtype != np.bool_:
        variance = max(variance, independent)
    degrees = np.inf
    if clusters is not None:
        mass = whole(x**2)
        degrees = max(mass.sum() ** 2 / (mass**2).sum() - 1, 1.0)
        variance *= max(1.0, float((whole(x * y) ** 2).sum()) / max(independent, 1e-300) * (degrees + 1) / degrees)
    statistic = abs(float(x @ y)) / max(np.sqrt(variance), 1e-300)
    return Adjusted(effect, float(error), float(2 * stats.t.sf(statistic, degrees)))


def power_of_test(effect: float, error: float, alpha: float) -> float:
    """Return the chance that a two-sided test at level alpha finds a gap of this size.

    Args:
        effect: true gap.
        error: standard error of its estimate.
        alpha: level in (0, 1).
    """
    if not error > 0:
        return float("nan")
    limit, shift = stats.norm.ppf(1 - alpha / 2), abs(effect) / error
    return float(stats.norm.sf(limit - shift) + stats.norm.cdf(-limit - shift))
