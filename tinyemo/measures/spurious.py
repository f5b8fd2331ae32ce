"""Spurious features: how far brightness, saturation, size and file source alone predict label and error.

Each covariate is cut into bins of equal counts. A test over the bins, with the label mix held equal, finds effects of
any shape on errors; the same without labels finds what the covariate says about the label itself.

Shape letters: N images, B bins, K clusters.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tinyemo.measures.discoveries import Finding
from tinyemo.measures.gaps import Floats, Ints, design_of, stratified_gap
from tinyemo.measures.groups import MIN_IMAGES
from tinyemo.measures.scored import ScoredData

NUM_BINS = 5
MAX_FIT = 20_000


def find_spurious(data: ScoredData, *, seed: int = 0) -> list[Finding]:
    """Return for each covariate a finding about errors and one about labels."""
    findings = []
    for name, values in data.covariates.items():
        bins = bins_of(values)
        if bins.max() < 1 or np.bincount(bins).min() < MIN_IMAGES:
            continue
        findings += [_error_finding(data, name, bins), _label_finding(data, name, bins)]
    return findings


def bins_of(values: Floats, num_bins: int = NUM_BINS) -> Ints:
    """Return (N,) bins of about equal counts; unknown values count as the median."""
    known = np.nan_to_num(values, nan=np.nanmedian(values) if np.isfinite(values).any() else 0.0)
    edges = np.unique(np.quantile(known, np.linspace(0, 1, num_bins + 1)[1:-1]))
    return np.unique(np.searchsorted(edges, known, side="right"), return_inverse=True)[1].astype(np.int64)


def _error_finding(data: ScoredData, name: str, bins: Ints) -> Finding:
    """Return how much recall falls from the best bin to the worst, with the label mix held equal."""
    p = bins_test(data.is_right.astype(np.float64)[:, None], bins, data.label, data.clusters)
    gaps = [
        stratified_gap(data.is_right, bins == place, data.label, len(data.labels), data.clusters)
        for place in range(int(bins.max()) + 1)
    ]
    levels = np.array([gap.effect[-1] for gap in gaps])
    worst, best = int(levels.argmin()), int(levels.argmax())
    pair = (bins == worst) | (bins == best)
    clusters = None if data.clusters is None else data.clusters[pair]
    gap = stratified_gap(data.is_right[pair], bins[pair] == worst, data.label[pair], len(data.labels), clusters)
    effect = float(gap.effect[-1])
    lowest, highest = _range(data.covariates[name], bins == worst)
    title = f"recall is {effect:+.3f} where {name} is {lowest:.3g} to {highest:.3g}, against the best fifth of {name}"
    return Finding(
        part="spurious", title=title, data=data.name, group=name, other="", metric="error", effect=effect,
        low=float(gap.low[-1]), high=float(gap.high[-1]), p=p, error=float(gap.error[-1]), num_images=len(data),
        details={"recall_of_bins": levels.tolist()},
    )  # fmt: skip


def _label_finding(data: ScoredData, name: str, bins: Ints) -> Finding:
    """Return how much better than by chance a covariate's bin alone tells the label (Cramer's V)."""
    present = np.unique(data.label, return_inverse=True)[1].astype(np.int64)
    counts = np.bincount(bins * (present.max() + 1) + present, minlength=(bins.max() + 1) * (present.max() + 1))
    table = counts.reshape(int(bins.max()) + 1, -1)
    chi2 = float(stats.chi2_contingency(table, correction=False).statistic) if min(table.shape) > 1 else 0.0
    cramers_v = float(np.sqrt(chi2 / len(data) / max(min(table.shape) - 1, 1)))
    outcome = np.eye(int(present.max()) + 1)[:, 1:][present]
    p = bins_test(outcome, bins, np.zeros(len(data), np.int64), data.clusters)
    title = f"{name} alone is tied to the label: Cramer's V {cramers_v:.3f}"
    return Finding(
        part="spurious", title=title, data=data.name, group=name, other="", metric="label", effect=cramers_v,
        low=float("nan"), high=float("nan"), p=p, num_images=len(data),
    )  # fmt: skip


def _range(values: Floats, rows: NDArray[np.bool_]) -> tuple[float, float]:
    inside = values[rows]
    return float(np.nanmin(inside)), float(np.nanmax(inside))


def bins_test(outcomes: Floats, bins: Ints, strata: Ints, clusters: Ints | None) -> float:
    """Return p of a score test that no outcome depends on the bin within strata.

    Args:
        outcomes: (N, M) float.
        bins: (N,) in [0, B).
        strata: (N,).
        clusters: (N,) or None for independent rows.
    """
    strata = np.unique(strata, return_inverse=True)[1]
    num_strata, num_bins, width = int(strata.max()) + 1, int(bins.max()) + 1, outcomes.shape[1]
    rows = np.bincount(strata, minlength=num_strata)
    means = np.stack([np.bincount(strata, column, num_strata) for column in outcomes.T], 1) / rows[:, None]
    residual = outcomes - means[strata]
    share = (
        np.bincount(strata * num_bins + bins, minlength=num_strata * num_bins).reshape(num_strata, -1) / rows[:, None]
    )
    # Sums of residuals in every bin but the first; residuals sum to 0 in a stratum, so centred bins give the same sums.
    score = np.stack([np.bincount(bins, column, num_bins) for column in residual.T], 1)[1:].ravel()
    spread = np.zeros((num_bins - 1, width, num_bins - 1, width))
    for stratum in range(num_strata):
        inside = residual[strata == stratum]
        if len(inside) < 2:
            continue
        within = inside.T @ inside / (len(inside) - 1)
        q = share[stratum, 1:]
        spread += np.einsum("ab,cd->acbd", len(inside) * (np.diag(q) - np.outer(q, q)), within)
    variance = spread.reshape(len(score), len(score))
    statistic = float(score @ np.linalg.pinv(variance, hermitian=True) @ score)
    degrees = int(np.linalg.matrix_rank(variance, hermitian=True))
    if clusters is None:
        return float(stats.chi2.sf(statistic, degrees))
    # The design effect of clusters, averaged over the directions of the test (Rao and Scott's first-order correction).
    centred = (np.eye(num_bins)[bins] - share[strata])[:, 1:]
    parts = (centred[:, :, None] * residual[:, None, :]).reshape(len(residual), -1)
    sums = np.stack([np.bincount(clusters, column) for column in parts.T], 1)
    grown = np.trace(np.linalg.pinv(parts.T @ parts, hermitian=True) @ (sums.T @ sums)) / max(degrees, 1)
    num_clusters = np.count_nonzero(np.bincount(clusters))
    spare = max(num_clusters - degrees, 1)
    return float(stats.f.sf(statistic / max(degrees, 1) / max(grown, 1.0), degrees, spare))


def predicts_label(data: ScoredData, *, seed: int = 0) -> dict[str, float]:
    """Return the balanced accuracy with which all covariates together tell the label and the error, cross-validated.

    Logistic regression on the bins of the covariates, on at most MAX_FIT images; chance is 1 / C and 1 / 2.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score

    rows = np.random.default_rng(seed).permutation(len(data))[:MAX_FIT]
    design = design_of([], {name: values[rows] for name, values in data.covariates.items()})
    clusters = rows if data.clusters is None else data.clusters[rows]
    found = {}
    for name, target in (("label", data.label[rows]), ("error", data.is_right[rows].astype(np.int64))):
        counts = np.bincount(target)
        if (counts > 0).sum() < 2 or counts[counts > 0].min() < 5 or len(np.unique(clusters)) < 5:
            continue
        model = LogisticRegression(max_iter=300, class_weight="balanced")
        scores = cross_val_score(model, design, target, groups=clusters, cv=GroupKFold(5), scoring="balanced_accuracy")
        found[name] = float(scores.mean())
    return found
