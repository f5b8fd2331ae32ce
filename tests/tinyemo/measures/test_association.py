"""Association of label words with group words agrees with scipy's permutation test."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.planted_bias import PLANTED_LABEL, plant
from tinyemo.measures.association import WordGroups, associate, find_score_ties, unit


def test_p_is_that_of_the_exact_permutation_test() -> None:
    rng = np.random.default_rng(0)
    words, targets = unit(rng.normal(size=(9, 20))), unit(rng.normal(size=(6, 20)))
    found = associate(targets, WordGroups("pair", "a", "b", words[:5], words[5:]))
    cosines = targets @ words.T
    for row in range(6):
        reference = stats.permutation_test(
            (cosines[row, :5], cosines[row, 5:]),
            lambda x, y, axis: x.mean(axis) - y.mean(axis),
            permutation_type="independent", vectorized=True, n_resamples=np.inf,
        )  # fmt: skip
        assert found.difference[row] == pytest.approx(reference.statistic, abs=1e-12)
        # scipy doubles the smaller tail; this counts differences as large in absolute value, over the same partitions.
        law = reference.null_distribution
        assert found.p[row] == pytest.approx(np.mean(np.abs(law) >= abs(reference.statistic) - 1e-12), abs=1e-9)


def test_drawn_partitions_come_near_the_exact_p() -> None:
    rng = np.random.default_rng(1)
    words, targets = unit(rng.normal(size=(24, 8))), unit(rng.normal(size=(4, 8)))
    found = associate(targets, WordGroups("pair", "a", "b", words[:12], words[12:]))
    difference, spread = found.difference, (targets @ words.T).std(1, ddof=1)
    assert found.effect_size == pytest.approx(difference / spread, abs=1e-12)
    normal = 2 * stats.norm.sf(np.abs(difference) / (spread * np.sqrt(1 / 12 + 1 / 12)))
    assert found.p == pytest.approx(normal, abs=0.03)


def test_a_group_whose_images_are_only_harder_ties_no_label() -> None:
    ties = find_score_ties(plant("shift", seed=2, effect=0.5).data, "country")
    assert min(tie.p for tie in ties) * len(ties) > 0.05


def test_images_pulled_to_one_label_tie_that_label() -> None:
    planted = plant("word", seed=2)
    strongest = min(find_score_ties(planted.data, "country"), key=lambda tie: tie.p)
    assert strongest.metric == f"score:{planted.data.labels[PLANTED_LABEL]}"
    assert strongest.effect < 0  # north is the first group, south was pulled
