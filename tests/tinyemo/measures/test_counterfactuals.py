"""How often a change flips the label."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from benchmarks.planted_bias import plant
from tinyemo.measures.counterfactuals import TOLERANCE, find_flips


def flipped(data, rows):
    changed = data.predicted.copy()
    changed[rows] = (changed[rows] + 1) % len(data.labels)
    return changed


def test_the_rate_of_flips_has_wilsons_interval() -> None:
    data = plant("none", seed=0, num_images=1000).data
    whole = find_flips(data, "darker", flipped(data, np.arange(150)))[0]
    assert whole.effect == pytest.approx(0.15)
    assert (whole.low, whole.high) == pytest.approx(proportion_confint(150, 1000, method="wilson"), abs=1e-9)
    assert whole.p == pytest.approx(stats.binomtest(150, 1000, TOLERANCE, alternative="greater").pvalue, rel=1e-9)
    assert sum(whole.details["flips_to"].values()) == 150


def test_nothing_flips_where_nothing_changes() -> None:
    data = plant("none", seed=0, num_images=300).data
    assert all(one.p == 1.0 for one in find_flips(data, "same", data.predicted))


def test_flips_in_one_group_are_found_there() -> None:
    data = plant("none", seed=0, num_images=1000).data
    south = np.flatnonzero(data.groups["country"].codes == 1)[:120]
    found = {one.group: one for one in find_flips(data, "darker", flipped(data, south))}
    assert found["country=north"].effect < -0.3
    assert found["country=north"].p < 1e-20
    assert min(one.p for group, one in found.items() if group.startswith(("camera", "season"))) > 0.001


def test_clusters_widen_the_interval() -> None:
    data = plant("none", seed=0, num_images=1000, images_per_author=5).data
    rows = np.flatnonzero(data.clusters < 30)
    whole = find_flips(data, "darker", flipped(data, rows))[0]
    low, high = proportion_confint(150, 1000, method="wilson")
    assert whole.high - whole.low > 2 * (high - low)
