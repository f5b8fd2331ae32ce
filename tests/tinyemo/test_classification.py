"""Evaluation and prediction with projectors whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinyemo.classification import ROWS_PER_FORWARD, evaluate_left_out, evaluate_projector, predict_labels
from tinyemo.config import ProjectorConfig
from tinyemo.errors import DataError
from tinyemo.features import FeatureTable
from tinyemo.label_embeddings import LabelEmbeddings
from tinyemo.projector import MetricProjector

WORDS = ("anger", "joy", "cheerfulness")


def axis_projector() -> MetricProjector:
    """A positive feature k lands on axis k, and word k lies on axis k."""
    model = MetricProjector(ProjectorConfig(encoder_width=512, hidden_size=512)).eval()
    for layer in (model.layers[0], model.layers[4]):
        assert isinstance(layer, nn.Linear)
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    model.labels = LabelEmbeddings(WORDS, 5 * torch.eye(512)[:3], "llm", "r", "real", "word")
    return model


def table(places: list[int], labels: list[str] | None) -> FeatureTable:
    return FeatureTable([f"image-{i}" for i in range(len(places))], labels, 10 * torch.eye(512)[places])


def test_figures_of_a_known_classifier():
    rows = table([0, 0, 1, 2, 1], ["anger", "joy", "joy", "Cheerfullness", "anger"])
    scores = evaluate_projector(axis_projector(), rows, WORDS)
    assert scores.confusion == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    assert scores.top1_accuracy == pytest.approx(3 / 5)
    assert scores.per_class_recall == {"anger": 0.5, "joy": 0.5, "cheerfulness": 1.0}
    assert scores.num_samples == 5


def test_no_row_is_dropped_at_any_count():
    for count in (1, ROWS_PER_FORWARD, ROWS_PER_FORWARD + 1):
        scores = evaluate_projector(axis_projector(), table([1] * count, ["joy"] * count), WORDS)
        assert (scores.num_samples, scores.top1_accuracy) == (count, 1.0)


def test_predictions_are_sorted_by_score():
    rows = predict_labels(axis_projector(), table([2, 0], None), ["joy", "cheerfullness", "anger"])
    assert [row["id"] for row in rows] == ["image-0", "image-1"]
    assert [row["label"] for row in rows] == ["cheerfulness", "anger"]
    for row in rows:
        assert next(iter(row["scores"])) == row["label"]
        assert list(row["scores"].values()) == sorted(row["scores"].values(), reverse=True)
        assert set(row["scores"]) == set(WORDS)
    assert rows[0]["scores"]["cheerfulness"] == pytest.approx(1.0, abs=1e-3)


def test_one_word_is_allowed_and_twice_the_same_is_one():
    [row] = predict_labels(axis_projector(), table([0], None), ["joy", "Joy"])
    assert list(row["scores"]) == ["joy"]


def test_what_cannot_be_evaluated_says_why():
    model = axis_projector()
    with pytest.raises(DataError, match="no column 'emotion' or 'label'"):
        evaluate_projector(model, table([0], None), WORDS)
    with pytest.raises(DataError, match=r"1 of 2 rows have labels that are not among the words \(awe\)"):
        evaluate_projector(model, table([0, 1], ["awe", "joy"]), WORDS)
    with pytest.raises(DataError, match="no label embedding for awe"):
        predict_labels(model, table([0], None), ["joy", "awe"])
    with pytest.raises(DataError, match="at least one word"):
        predict_labels(model, table([0], None), [])
    wide = FeatureTable(["a"], ["joy"], torch.zeros(1, 768))
    with pytest.raises(DataError, match="features are 768 wide and the projector takes 512"):
        evaluate_projector(model, wide, WORDS)


def test_left_out_labels_are_told_apart_among_themselves_beside_the_seen_ones():
    rows = table([0, 1, 2, 0, 2], ["anger", "joy", "cheerfulness", "joy", "joy"])
    scores = evaluate_left_out(axis_projector(), rows, WORDS, ["joy", "cheerfullness"])
    assert scores.seen is not None
    assert (scores.seen.top1_accuracy, scores.seen.num_samples) == (1.0, 1)
    assert scores.zero_shot.num_samples == 4
    assert scores.among_all == pytest.approx(2 / 4)
    assert scores.chance == 0.5
    # Image 3 lies on anger: equally far from both, the first of the two wins.
    assert scores.zero_shot.confusion == [[2, 1], [0, 1]]


def test_one_label_left_out_is_no_choice():
    with pytest.raises(DataError, match="at least 2"):
        evaluate_left_out(axis_projector(), table([0], ["anger"]), WORDS, ["joy"])
    with pytest.raises(DataError, match="no row has"):
        evaluate_left_out(axis_projector(), table([0], ["anger"]), WORDS, ["joy", "cheerfulness"])
