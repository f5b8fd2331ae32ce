"""Slices that no column names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.planted_bias import plant
from tinyemo.measures.slices import describe, find_slices


def test_a_hidden_region_is_found_and_described() -> None:
    planted = plant("cluster", seed=0)
    best = min(find_slices(planted.data), key=lambda one: one.finding.p)
    inside = np.isin(np.arange(len(planted.data)), best.rows)
    assert (inside & planted.in_plant).sum() / (inside | planted.in_plant).sum() > 0.8
    assert best.finding.effect < -0.3
    assert best.finding.explained_by is None
    assert sum(best.finding.details["labels"].values()) == len(best.rows)


def test_a_region_that_a_column_names_is_explained_by_it() -> None:
    planted = plant("shift", seed=0, effect=0.5)
    best = min(find_slices(planted.data), key=lambda one: one.finding.p)
    assert best.finding.p < 1e-6
    assert best.finding.explained_by == "country"
    assert best.finding.details["groups"]["country"]["most_over"] == "south"


def test_the_description_compares_the_slice_with_all_images() -> None:
    data = plant("none", seed=0, num_images=200).data
    members = data.covariates["brightness"] > 0.6
    found = describe(data, members)["covariates"]["brightness"]
    assert found["slice"] > 0.6 > found["all"]


def test_too_few_images_give_no_slice() -> None:
    data = plant("none", seed=0, num_images=50).data
    assert find_slices(data) == []
    assert find_slices(replace(data, groups={}, covariates={})) == []
