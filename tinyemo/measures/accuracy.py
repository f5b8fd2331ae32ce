"""Accuracy of a classifier in all its forms, with 95 % intervals, from the scores of labelled images.

Everything is computed from counts that add up over images (`Counts`). A bootstrap resample is therefore a weighted sum
of the counts of clusters, and costs the same for a thousand images as for a million.

Shape letters: N images, C labels, K clusters, R resamples, B bins of confidence, T values of k in top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyemo.measures.intervals import (
    NUM_RESAMPLES,
    Interval,
    basic_interval,
    bootstrap_weights,
    group_clusters,
    percentile_interval,
    wilson_interval,
)

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]

NUM_BINS = 15
"""Bins of equal width over [0, 1], as in arXiv 1706.04599."""
ROWS_AT_ONCE = 65_536


@dataclass(frozen=True)
class Outcomes:
    """What a classifier made of N labelled images.

    Attributes:
        targets: (N,) place of the true label, in [0, C).
        predicted: (N,) place of the label with the highest score.
        ranks: (N,) number of labels that come before the true one; 0 where it is the nearest. Of equal scores the label
            that stands first comes first, as in `argmax`.
        confidences: (N,) softmax probability of the predicted label, in (0, 1].
        num_labels: C.
    """

    targets: Ints
    predicted: Ints
    ranks: Ints
    confidences: Floats
    num_labels: int

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """(N,) whether the predicted label is the true one."""
        is_right: NDArray[np.bool_] = self.ranks == 0
        return is_right

    def take(self, rows: NDArray[Any]) -> Outcomes:
        """Return the outcomes of some images, given by their places or a mask."""
        columns = (self.targets[rows], self.predicted[rows], self.ranks[rows], self.confidences[rows])
        return Outcomes(*columns, self.num_labels)


def outcomes_of(scores: Floats, targets: Ints, temperature: float) -> Outcomes:
    """Return the outcomes of images from their scores.

    Args:
        scores: (N, C) cosines, or any scores of which the highest wins.
        targets: (N,) place of the true label.
        temperature: divides the scores before the softmax that gives the confidence, > 0.
    """
    num_rows, num_labels = scores.shape
    predicted, ranks = np.empty(num_rows, np.int64), np.empty(num_rows, np.int64)
    confidences = np.empty(num_rows, np.float64)
    places = np.arange(num_labels)
    for start in range(0, num_rows, ROWS_AT_ONCE):
        part = slice(start, start + ROWS_AT_ONCE)
        block, target = scores[part], targets[part, None]
        own = np.take_along_axis(block, target, axis=1)
        predicted[part] = block.argmax(axis=1)
        ranks[part] = (block > own).sum(axis=1) + ((block == own) & (places < target)).sum(axis=1)
        above = (block - block.max(axis=1, keepdims=True)).astype(np.float64) / temperature
        confidences[part] = 1 / np.exp(above).sum(axis=1)
    return Outcomes(targets.astype(np.int64), predicted, ranks, confidences, num_labels)


def confusion_counts(outcomes: Outcomes) -> Ints:
    """Return (C, C) counts; rows are true labels, columns predictions."""
    size = outcomes.num_labels
    return np.bincount(outcomes.targets * size + outcomes.predicted, minlength=size**2).reshape(size, size)


@dataclass(frozen=True)
class Counts:
    """Counts that add up over images and determine every measure; `...` are clusters, resamples, or nothing.

    Attributes:
        right: (..., C) images by true label that were predicted right.
        true: (..., C) images by true label.
        predicted: (..., C) images by predicted label.
        in_top: (..., T) images whose true label is among the k best.
        bin_count: (..., B) images by confidence.
        bin_confidence: (..., B) sum of their confidences.
        bin_right: (..., B) how many of them were predicted right.
    """

    right: Floats
    true: Floats
    predicted: Floats
    in_top: Floats
    bin_count: Floats
    bin_confidence: Floats
    bin_right: Floats

    @property
    def num_images(self) -> Floats:
        """(...,) images."""
        num_images: Floats = self.true.sum(axis=-1)
        return num_images

    def each(self, change: Callable[[Floats], Floats]) -> Counts:
        """Return the counts with every array changed by the same function."""
        return Counts(*(change(getattr(self, field.name)) for field in fields(self)))

    def total(self) -> Counts:
        """Return the counts over all clusters."""
        return self.each(lambda counts: counts.sum(axis=0))

    def resampled(self, weights: Floats) -> Counts:
        """Return the counts of R resamples, given (R, K) how often each cluster is drawn."""
        return self.each(lambda counts: weights @ counts)

    def top1_accuracy(self) -> Floats:
        """(...,) share of images predicted right, in [0, 1]."""
        return _ratio(self.right.sum(axis=-1), self.num_images)

    def top_k_accuracy(self) -> Floats:
        """(..., T) share of images whose label is among the k best, in [0, 1]."""
        return _ratio(self.in_top, self.num_images[..., None])

    def recall(self) -> Floats:
        """(..., C) in [0, 1]; NaN for a label without images."""
        return _ratio(self.right, self.true)

    def precision(self) -> Floats:
        """(..., C) in [0, 1]; NaN for a label that is never predicted."""
        return _ratio(self.right, self.predicted)

    def balanced_accuracy(self) -> Floats:
        """(...,) mean recall over the labels that have images, in [0, 1]."""
        recall = self.recall()
        return _ratio(np.nansum(recall, axis=-1), (~np.isnan(recall)).sum(axis=-1))

    def macro_f1(self) -> Floats:
        """(...,) mean F1 over the labels that are true or predicted at least once, in [0, 1]."""
        both = self.true + self.predicted
        f1 = _ratio(2 * self.right, both)
        return _ratio(np.nansum(f1, axis=-1), (both > 0).sum(axis=-1))

    def expected_calibration_error(self) -> Floats:
        """(...,) mean distance of confidence and accuracy over the bins, weighted by their images, in [0, 1]."""
        return _ratio(np.abs(self.bin_confidence - self.bin_right).sum(axis=-1), self.num_images)


def _ratio(above: Any, below: Any) -> Floats:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Floats = np.divide(above, below, dtype=np.float64)
    return ratio


def count_outcomes(outcomes: Outcomes, clusters: Ints, num_clusters: int, top_ks: Sequence[int] = ()) -> Counts:
    """Return the counts of each cluster.

    Args:
        outcomes: of N images.
        clusters: (N,) cluster of each image, in [0, K).
        num_clusters: K.
        top_ks: values of k for `in_top`.
    """
    labels, is_right = outcomes.num_labels, outcomes.is_right.astype(np.float64)
    bins = np.clip(np.ceil(outcomes.confidences * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)

    def tally(places: Ints, size: int, weights: Floats | None = None) -> Floats:
        counted = np.bincount(clusters * size + places, weights=weights, minlength=num_clusters * size)
        return counted.reshape(num_clusters, size).astype(np.float64)

    zeros = np.zeros_like(clusters)
    in_top = [tally(zeros, 1, (outcomes.ranks < k).astype(np.float64)) for k in top_ks]
    return Counts(
        right=tally(outcomes.targets, labels, is_right),
        true=tally(outcomes.targets, labels),
        predicted=tally(outcomes.predicted, labels),
        in_top=np.concatenate(in_top, axis=1) if in_top else np.empty((num_clusters, 0)),
        bin_count=tally(bins, NUM_BINS),
        bin_confidence=tally(bins, NUM_BINS, outcomes.confidences),
        bin_right=tally(bins, NUM_BINS, is_right),
    )


@dataclass(frozen=True)
class LabelMeasures:
    """Recall and precision of one label."""

    label: str
    count: int
    """Images with this label."""
    recall: Interval
    precision: Interval


@dataclass(frozen=True)
class ReliabilityBin:
    """Images whose confidence lies above `low` and at or below `high`; means are None where there are none."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Measures:
    """Every measure of a classifier on one data set."""

    num_images: int
    num_clusters: int
    metrics: dict[str, Interval]
    """top1_accuracy, top<k>_accuracy, balanced_accuracy, macro_f1 and expected_calibration_error."""
    per_class: list[LabelMeasures]
    confusion: list[list[int]]
    """(C, C) counts; rows are true labels, columns predictions."""
    reliability: list[ReliabilityBin]


def measure(
    outcomes: Outcomes,
    labels: Sequence[str],
    clusters: NDArray[Any] | Sequence[str] | None = None,
    *,
    top_ks: Sequence[int] = (2,),
    num_resamples: int = NUM_RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Measures:
    """Return every measure with its interval.

    Shares get Wilson's interval where every image is its own cluster. Everything else gets the bootstrap over clusters.

    Args:
        outcomes: of N images, at least one.
        labels: C labels.
        clusters: (N,) theme, author or image of each row, whose rows are not independent; None where each row is one.
        top_ks: values of k; those that are not below C are left out.
        num_resamples: R.
        level: of the intervals.
        seed: of the resamples.
    """
    assert len(outcomes.targets) > 0
    assert outcomes.num_labels == len(labels)
    top_ks = [k for k in top_ks if 1 < k < len(labels)]
    groups, num_groups, num_clusters = group_clusters(clusters, len(outcomes.targets), seed)
    counts = count_outcomes(outcomes, groups, num_groups, top_ks)
    total = counts.total()
    resamples = counts.resampled(bootstrap_weights(num_groups, num_resamples, seed))
    is_independent = num_clusters == len(outcomes.targets)

    def interval(of: Callable[[Counts], Floats]) -> list[Interval]:
        values, samples = np.atleast_1d(of(total)), of(resamples).reshape(num_resamples, -1)
        low, high = percentile_interval(samples, num_groups, level)
        return [Interval.of(*numbers) for numbers in zip(values, low, high, strict=True)]

    def share(successes: Floats, trials: Floats, of: Callable[[Counts], Floats]) -> list[Interval]:
        if not is_independent:
            return interval(of)
        low, high = wilson_interval(successes, trials, level)
        return [Interval.of(*numbers) for numbers in zip(np.atleast_1d(of(total)), low, high, strict=True)]

    num_images, right = np.atleast_1d(total.num_images), np.atleast_1d(total.right.sum())
    top = share(total.in_top, np.broadcast_to(num_images, total.in_top.shape), Counts.top_k_accuracy)
    calibration = float(total.expected_calibration_error())
    calibration_limits = basic_interval(calibration, resamples.expected_calibration_error(), num_groups, level)
    recalls, precisions = (
        share(total.right, total.true, Counts.recall),
        share(total.right, total.predicted, Counts.precision),
    )
    return Measures(
        num_images=len(outcomes.targets),
        num_clusters=num_clusters,
        metrics={
            "top1_accuracy": share(right, num_images, Counts.top1_accuracy)[0],
            **{f"top{k}_accuracy": found for k, found in zip(top_ks, top, strict=True)},
            "balanced_accuracy": interval(Counts.balanced_accuracy)[0],
            "macro_f1": interval(Counts.macro_f1)[0],
            "expected_calibration_error": Interval.of(calibration, *calibration_limits),
        },
        per_class=[
            LabelMeasures(label, int(total.true[place]), recalls[place], precisions[place])
            for place, label in enumerate(labels)
        ],
        confusion=confusion_counts(outcomes).tolist(),
        reliability=_reliability(total),
    )


def _reliability(total: Counts) -> list[ReliabilityBin]:
    bins = zip(total.bin_count, total.bin_confidence, total.bin_right, strict=True)
    return [
        ReliabilityBin(
            low=place / NUM_BINS,
            high=(place + 1) / NUM_BINS,
            count=int(count),
            confidence=float(confidence / count) if count else None,
            accuracy=float(right / count) if count else None,
        )
        for place, (count, confidence, right) in enumerate(bins)
    ]
