"""Planted bias is found by the right part, nothing else is blamed, and unbiased data is left alone.

Seeds are fixed, so the tests cannot fail by chance; `benchmarks/bias.py` measures rates over many seeds and effect
sizes.
"""

from __future__ import annotations

import pytest

from benchmarks.planted_bias import plant, report


@pytest.mark.parametrize("kind", ["shift", "word", "cluster", "brightness"])
@pytest.mark.parametrize("seed", [11, 12])
def test_the_right_part_finds_what_was_planted(kind, seed) -> None:
    outcome = report(plant(kind, seed=seed))
    assert outcome.is_found
    assert [one.id for one in outcome.misplaced] == []


def test_a_gap_that_is_only_brightness_is_explained_by_it() -> None:
    findings = report(plant("brightness", seed=11)).findings
    gaps = [one for one in findings if one.part == "groups" and one.group.startswith("country=") and one.is_significant]
    assert gaps
    assert {one.explained_by for one in gaps} == {"brightness"}


@pytest.mark.parametrize("images_per_author", [1, 5])
def test_unbiased_data_is_left_alone(images_per_author) -> None:
    """At most 5 % of reports may blame anything; more than 2 of 10 would come once in ninety."""
    reports = [report(plant("none", seed=seed, images_per_author=images_per_author)) for seed in range(20, 30)]
    assert sum(any(one.is_blamed for one in each.findings) for each in reports) <= 2
