"""Gaps agree with statsmodels and scipy, and their intervals cover at their rate."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.contingency_tables import StratifiedTable

from tinyemo.measures import gaps
from tinyemo.measures.gaps import adjusted_gap, design_of, power_of_test, stratified_gap

NEAR = {"abs": 1e-9, "rel": 1e-9}


def drawn(seed: int, num_rows: int = 600, num_strata: int = 4):
    rng = np.random.default_rng(seed)
    strata = rng.integers(num_strata, size=num_rows)
    in_group = rng.random(num_rows) < 0.2 + 0.1 * strata
    outcome = rng.random(num_rows) < 0.4 + 0.1 * strata
    return rng, outcome, in_group, strata


@pytest.mark.parametrize("seed", range(5))
def test_the_gap_over_strata_is_the_test_of_mantel_and_haenszel(seed, monkeypatch) -> None:
    """Without the exact test, p is that of the CMH statistic."""
    monkeypatch.setattr(gaps, "MAX_EXACT", 0)
    _, outcome, in_group, strata = drawn(seed)
    found = stratified_gap(outcome, in_group, strata, 4)
    tables = np.zeros((2, 2, 4))
    np.add.at(tables, (1 - in_group.astype(int), 1 - outcome.astype(int), strata), 1)
    reference = StratifiedTable(tables)
    assert found.p[-1] == pytest.approx(reference.test_null_odds(correction=False).pvalue, **NEAR)
    risk = [table[0, 0] / table[0].sum() - table[1, 0] / table[1].sum() for table in np.moveaxis(tables, 2, 0)]
    assert found.effect[:-1] == pytest.approx(risk, **NEAR)
    weight = [table[0].sum() * table[1].sum() / table.sum() for table in np.moveaxis(tables, 2, 0)]
    assert found.effect[-1] == pytest.approx(np.average(risk, weights=weight), **NEAR)


@pytest.mark.parametrize("seed", range(3))
def test_p_of_a_stratum_is_exact(seed) -> None:
    _, outcome, in_group, strata = drawn(seed, num_rows=120)
    found = stratified_gap(outcome, in_group, strata, 4)
    for stratum in range(4):
        rows = strata == stratum
        law = stats.hypergeom(rows.sum(), outcome[rows].sum(), in_group[rows].sum())
        right = (outcome & in_group)[rows].sum()
        assert found.p[stratum] == pytest.approx(min(1, 2 * min(law.cdf(right), law.sf(right - 1))), **NEAR)


@pytest.mark.parametrize("is_clustered", [False, True])
def test_an_adjusted_gap_is_that_of_least_squares(is_clustered) -> None:
    rng, outcome, in_group, strata = drawn(7)
    clusters = rng.integers(60, size=len(outcome))
    brightness = rng.random(len(outcome))
    design = design_of([strata], {"brightness": brightness}, num_bins=4)
    found = adjusted_gap(outcome, in_group, design, clusters if is_clustered else None)
    # statsmodels wants columns that are independent; bins and strata each sum to one.
    columns = np.delete(design.toarray(), 4, axis=1)
    model = sm.OLS(outcome.astype(float), np.column_stack([in_group, columns]))
    options = {"cov_type": "cluster", "cov_kwds": {"groups": clusters}} if is_clustered else {"cov_type": "HC1"}
    reference = model.fit(**options)
    assert found.effect == pytest.approx(reference.params[0], **NEAR)
    assert found.error == pytest.approx(reference.bse[0], **NEAR)


def test_a_design_that_determines_the_group_leaves_nothing() -> None:
    _, outcome, in_group, _ = drawn(1)
    assert adjusted_gap(outcome, in_group, design_of([in_group.astype(np.int64)])).p == 1.0


@pytest.mark.parametrize("images_per_author", [1, 6])
def test_intervals_cover_and_tests_hold_their_level(images_per_author) -> None:
    """Over 1,000 repetitions, also with images of an author alike."""
    rng = np.random.default_rng(3)
    covered = rejected = 0
    author = np.arange(360) // images_per_author
    clusters = author if images_per_author > 1 else None
    for _ in range(1000):
        mood = rng.normal(size=author[-1] + 1)[author]
        in_group = (rng.random(author[-1] + 1) < 0.4)[author]
        strata = rng.integers(3, size=360)
        outcome = rng.normal(size=360) + (mood if images_per_author > 1 else 0.0) < 0.4
        found = stratified_gap(outcome, in_group, strata, 3, clusters)
        covered += bool(found.low[-1] <= 0 <= found.high[-1])
        rejected += bool(found.p[-1] <= 0.05)
    assert 930 <= covered <= 985
    assert rejected <= 65


def test_clusters_widen_the_interval_of_images_that_are_alike() -> None:
    _, outcome, in_group, strata = drawn(2, num_rows=100)
    fourfold = [np.repeat(each, 4) for each in (outcome, in_group, strata)]
    apart = stratified_gap(*fourfold, 4)
    together = stratified_gap(*fourfold, 4, np.repeat(np.arange(100), 4))
    assert together.error[-1] > 1.6 * apart.error[-1]
    assert together.p[-1] > apart.p[-1]


def test_power_is_the_level_without_a_gap_and_half_at_the_limit() -> None:
    assert power_of_test(0.0, 0.1, 0.05) == pytest.approx(0.05)
    assert power_of_test(0.1 * stats.norm.ppf(0.975), 0.1, 0.05) == pytest.approx(0.5, abs=1e-3)
