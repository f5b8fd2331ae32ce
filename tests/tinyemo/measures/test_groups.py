"""Figures and gaps of groups agree with fairlearn, and bad columns are refused in one line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame
from sklearn.metrics import accuracy_score, precision_score, recall_score

from benchmarks.planted_bias import plant
from tinyemo.errors import DataError
from tinyemo.measures.groups import compare_sets, find_gaps, group_table
from tinyemo.measures.scored import Column


@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_groups_is_the_metric_frame(seed) -> None:
    data = plant("shift", seed=seed, num_images=800).data
    codes, names = data.groups["season"].codes, np.array(data.groups["season"].names)
    table = group_table(data, "season")
    common = {"y_true": data.label, "y_pred": data.predicted, "sensitive_features": names[codes]}
    frame = MetricFrame(metrics=accuracy_score, **common)
    assert table.accuracy == pytest.approx(frame.by_group[list(table.names)].to_numpy(), abs=1e-9)
    for place in range(len(data.labels)):
        one = {"labels": [place], "average": "macro", "zero_division": np.nan}
        for score, found in ((recall_score, table.recall), (precision_score, table.precision)):
            frame = MetricFrame(metrics=lambda t, p, score=score, one=one: score(t, p, **one), **common)
            reference = frame.by_group[list(table.names)].to_numpy().astype(float)
            assert found[:, place] == pytest.approx(reference, abs=1e-9, nan_ok=True)


def test_the_gap_of_a_label_is_the_difference_of_the_metric_frame() -> None:
    data = plant("shift", seed=4, num_images=1500).data
    names = np.array(data.groups["country"].names)[data.groups["country"].codes]
    rows = data.label == 1
    frame = MetricFrame(
        metrics=accuracy_score, y_true=data.label[rows], y_pred=data.predicted[rows], sensitive_features=names[rows]
    )
    gap = next(one for one in find_gaps(data, "country") if one.metric == f"recall:{data.labels[1]}")
    assert gap.effect == pytest.approx(frame.by_group["north"] - frame.by_group["south"], abs=1e-9)


def test_unknown_groups_are_left_out() -> None:
    data = plant("none", seed=0, num_images=400).data
    texts = np.where(np.arange(400) < 300, np.where(np.arange(400) % 2, "a", "b"), "")
    column = Column.of(texts)
    assert column.names == ("a", "b")
    assert (column.codes == -1).sum() == 100
    assert group_table(replace(data, groups={"x": column}), "x").count.tolist() == [150, 150]


def test_a_column_without_a_large_enough_group_is_refused_in_one_line() -> None:
    data = plant("none", seed=0, num_images=60).data
    column = Column(np.arange(60), tuple(f"theme{n}" for n in range(60)))
    with pytest.raises(DataError, match=r"no group of 'theme' has 20 images.*theme=theme0 has 1 images"):
        find_gaps(replace(data, groups={"theme": column}), "theme")


def test_the_gap_between_two_sets_is_found_and_none_between_halves_of_one() -> None:
    biased, fair = plant("brightness", seed=1, effect=0.8), plant("none", seed=1)
    plain = replace(biased.data, covariates={}, name="biased")
    recall = next(one for one in compare_sets(plain, replace(fair.data, name="fair")) if one.metric == "recall")
    assert recall.effect < -0.1
    assert recall.p < 1e-10
    halves = [fair.data.take(np.arange(4000) % 2 == half) for half in (0, 1)]
    recall = next(one for one in compare_sets(*halves) if one.metric == "recall")
    assert recall.p > 0.01


def test_sets_without_shared_labels_are_refused() -> None:
    data = plant("none", seed=0, num_images=100).data
    with pytest.raises(DataError, match="share 0 labels"):
        compare_sets(data, replace(data, labels=tuple("abcdefgh")))
