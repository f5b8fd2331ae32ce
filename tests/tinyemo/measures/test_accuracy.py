"""Measures against scikit-learn and fairlearn, and what must hold for any classifier."""

from __future__ import annotations

import numpy as np
import pytest
from fairlearn.metrics import MetricFrame
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from tinyemo.measures.accuracy import NUM_BINS, Outcomes, confusion_counts, count_outcomes, measure, outcomes_of

LABELS = ("anger", "awe", "fear", "joy", "sadness")
TEMPERATURE = 0.07
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{start}")
    for start in ("y_pred contains classes not in y_true", "A single label was found")
]


def made_scores(seed: int, num_rows: int, num_labels: int = len(LABELS)) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines that favour the true label, some of them equal, and the true labels, perhaps not all of them."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(rng.integers(1, num_labels + 1), size=num_rows)
    scores = rng.normal(0, 0.1, (num_rows, num_labels)) + 0.1 * (np.arange(num_labels) == targets[:, None])
    return scores.round(1 + seed % 3).astype(np.float32), targets


@given(seed=st.integers(0, 2**31), num_rows=st.integers(1, 300))
@settings(deadline=None, max_examples=60)
def test_measures_are_those_of_scikit_learn(seed: int, num_rows: int) -> None:
    scores, targets = made_scores(seed, num_rows)
    outcomes = outcomes_of(scores, targets, TEMPERATURE)
    predicted, places = scores.argmax(axis=1), range(len(LABELS))
    assert (outcomes.predicted == predicted).all()
    assert (outcomes.is_right == (predicted == targets)).all()
    assert confusion_counts(outcomes).tolist() == reference.confusion_matrix(targets, predicted, labels=places).tolist()
    found = measure(outcomes, LABELS, top_ks=(2, 3), num_resamples=10)
    wanted = {
        "top1_accuracy": reference.accuracy_score(targets, predicted),
        "balanced_accuracy": reference.balanced_accuracy_score(targets, predicted),
        "macro_f1": reference.f1_score(targets, predicted, average="macro"),
    }
    for name, value in wanted.items():
        assert found.metrics[name].value == pytest.approx(value, abs=1e-9)
    recall = reference.recall_score(targets, predicted, labels=places, average=None, zero_division=np.nan)
    precision = reference.precision_score(targets, predicted, labels=places, average=None, zero_division=np.nan)
    for row, r, p in zip(found.per_class, recall, precision, strict=True):
        assert (row.recall.value is None) == np.isnan(r)
        assert (row.precision.value is None) == np.isnan(p)
        assert row.recall.value is None or row.recall.value == pytest.approx(r, abs=1e-9)
        assert row.precision.value is None or row.precision.value == pytest.approx(p, abs=1e-9)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_top_k_is_that_of_scikit_learn_where_no_scores_are_equal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, targets = rng.normal(size=(80, 5)), rng.integers(5, size=80)
    found = measure(outcomes_of(scores, targets, 1.0), LABELS, top_ks=(2, 4, 5), num_resamples=2).metrics
    for k in (2, 4):
        wanted = reference.top_k_accuracy_score(targets, scores, k=k, labels=range(5))
        assert found[f"top{k}_accuracy"].value == pytest.approx(wanted, abs=1e-9)
    assert "top5_accuracy" not in found  # of 5 labels the right one is always among the best 5


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_a_resample_is_scored_like_rows_with_sample_weights(seed: int) -> None:
    """What the bootstrap averages over is the measure itself, not an approximation of it."""
    scores, targets = made_scores(seed, 120)
    rng = np.random.default_rng(seed)
    clusters, weights = rng.integers(9, size=120), rng.integers(4, size=(7, 9)).astype(float)
    weights[:, 0] += 1
    outcomes = outcomes_of(scores, targets, TEMPERATURE)
    counts = count_outcomes(outcomes, clusters, 9).resampled(weights)
    for place, row_weights in enumerate(weights[:, clusters]):
        if not row_weights.any():
            continue
        arguments = (targets, outcomes.predicted)
        kept = row_weights > 0
        assert counts.top1_accuracy()[place] == pytest.approx(
            reference.accuracy_score(*arguments, sample_weight=row_weights), abs=1e-9
        )
        assert counts.balanced_accuracy()[place] == pytest.approx(
            reference.balanced_accuracy_score(*(a[kept] for a in arguments), sample_weight=row_weights[kept]), abs=1e-9
        )
        assert counts.macro_f1()[place] == pytest.approx(
            reference.f1_score(*(a[kept] for a in arguments), sample_weight=row_weights[kept], average="macro"),
            abs=1e-9,
        )


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=20)
def test_counts_of_groups_are_those_of_a_metric_frame(seed: int) -> None:
    scores, targets = made_scores(seed, 200)
    groups = np.random.default_rng(seed).integers(4, size=200)
    outcomes = outcomes_of(scores, targets, TEMPERATURE)
    frame = MetricFrame(
        metrics={
            "accuracy": reference.accuracy_score,
            "f1": lambda y, p: reference.f1_score(y, p, average="macro"),
            "balanced": reference.balanced_accuracy_score,
        },
        y_true=targets,
        y_pred=outcomes.predicted,
        sensitive_features=groups,
    )
    counts = count_outcomes(outcomes, groups, 4)
    for name, found in (
        ("accuracy", counts.top1_accuracy()),
        ("f1", counts.macro_f1()),
        ("balanced", counts.balanced_accuracy()),
    ):
        np.testing.assert_allclose(found[frame.by_group.index.to_numpy()], frame.by_group[name], atol=1e-9)


def test_calibration_error_is_the_mean_over_bins() -> None:
    """Against a plain loop over the bins."""
    rng = np.random.default_rng(5)
    confidences, is_right = rng.uniform(0.2, 1, 5000), rng.uniform(size=5000) < 0.6
    confidences[0], confidences[1] = 1.0, 2 / NUM_BINS  # on an edge: of the bin below it
    outcomes = Outcomes(
        np.zeros(5000, np.int64), np.zeros(5000, np.int64), (~is_right).astype(np.int64), confidences, 2
    )
    wanted = 0.0
    for place in range(NUM_BINS):
        inside = (confidences > place / NUM_BINS) & (confidences <= (place + 1) / NUM_BINS)
        if inside.any():
            wanted += inside.mean() * abs(confidences[inside].mean() - is_right[inside].mean())
    found = measure(outcomes, ("no", "yes"), num_resamples=5)
    assert found.metrics["expected_calibration_error"].value == pytest.approx(wanted, abs=1e-9)
    assert sum(part.count for part in found.reliability) == 5000


def test_confidence_is_the_softmax_of_the_predicted_label() -> None:
    scores = np.log(np.array([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])) * TEMPERATURE
    outcomes = outcomes_of(scores, np.array([0, 1]), TEMPERATURE)
    np.testing.assert_allclose(outcomes.confidences, [0.7, 0.6], atol=1e-12)
    assert outcomes.ranks.tolist() == [0, 1]


def test_clusters_widen_the_interval() -> None:
    """Ten copies of each image tell no more than one."""
    scores, targets = made_scores(3, 100)
    ten = outcomes_of(np.repeat(scores, 10, axis=0), np.repeat(targets, 10), TEMPERATURE)

    def width(clusters: np.ndarray | None) -> float:
        found = measure(ten, LABELS, clusters).metrics["top1_accuracy"]
        assert found.low is not None
        assert found.high is not None
        return found.high - found.low

    assert width(np.repeat(np.arange(100), 10)) > 2.5 * width(None)
