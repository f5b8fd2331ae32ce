"""Pairs of losses and swapped images, against closed forms and by property."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestration.jobs.evaluation import other_images, summarise
from orchestration.jobs.paired import mean_by_group, paired_test


@settings(deadline=None)
@given(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=40))
def test_every_record_gets_another_image_and_every_image_is_handed_out_as_often(images: list[str]) -> None:
    if 2 * max(Counter(images).values()) > len(images):
        with pytest.raises(ValueError, match="not enough others"):
            other_images(images)
        return
    places = other_images(images)
    assert sorted(places) == list(range(len(images)))
    assert all(images[place] != image for place, image in zip(places, images, strict=True))


def test_five_lower_pairs_have_the_exact_p_of_all_signs_alike() -> None:
    """Of the 2^5 ways to sign five differences one has all of them positive."""
    first = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    found = paired_test(first, first + np.array([0.1, 0.2, 0.3, 0.4, 0.5]))
    assert found.p_wilcoxon == pytest.approx(1 / 32)
    assert (found.num_pairs, found.share_lower) == (5, 1.0)
    assert found.mean_difference == pytest.approx(0.3)
    # t = mean / (sd / sqrt(n)) with sd^2 = 0.025: 4.2426 at 4 degrees of freedom.
    assert found.p_t == pytest.approx(0.0066, abs=2e-4)
    assert paired_test(first + 1, first).p_wilcoxon == pytest.approx(1.0)


def test_equal_pairs_show_nothing() -> None:
    found = paired_test(np.ones(4), np.ones(4))
    assert (found.mean_difference, found.share_lower, found.p_wilcoxon, found.p_t) == (0, 0, 1, 1)


def test_means_by_image_count_every_image_once() -> None:
    assert mean_by_group(np.array([1.0, 3.0, 10.0]), ["b", "b", "a"]).tolist() == [10, 2]


def test_the_summary_tells_records_and_images_apart() -> None:
    rows = [
        {"id": f"x/{image}/{task}", "image": image, "right": right, "shuffled": 2.0, "text_only": 3.0}
        for image, task, right in [("a", "caption", 1.0), ("a", "sqa", 2.0), ("b", "caption", 1.5)]
    ]  # fmt: skip
    found = summarise(rows)
    assert (found.num_records, found.num_images) == (3, 2)
    assert found.loss == {"right": 1.5, "shuffled": 2.0, "text_only": 3.0}
    assert found.by_task["caption"]["right"] == 1.25
    assert (found.tests["shuffled"].num_pairs, found.tests_by_image["shuffled"].num_pairs) == (3, 2)
    assert found.tests["shuffled"].share_lower == pytest.approx(2 / 3)
