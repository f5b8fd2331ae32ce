"""Classification scores from a confusion matrix, which adds up over batches and ranks.

Shape letters: N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tinyemo.errors import DataError


@dataclass(frozen=True)
class Scores:
    """Accuracy, recalls and confusion of a classifier."""

    top1_accuracy: float
    """Right over all samples, in [0, 1]."""
    per_class_recall: dict[str, float | None]
    """Share of each label's samples that are right, in [0, 1]; None for a label without samples."""
    confusion: list[list[int]]
    """(C, C) counts; rows are true labels, columns predictions, both in the order of per_class_recall."""
    num_samples: int
    """Samples behind the figures."""


def confusion_matrix(targets: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """Count (C, C) int64 pairs; rows are true classes, columns predictions.

    Args:
        targets: (N,) int64 in [0, C).
        predictions: (N,) int64 in [0, C).
        num_classes: C.
    """
    cells = torch.bincount(targets * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def scores_from_confusion(confusion: Tensor, words: Sequence[str]) -> Scores:
    """Compute accuracy and recalls from a (C, C) confusion matrix whose classes are `words`.

    Raises:
        DataError: the matrix counts no sample.
    """
    assert confusion.shape == (len(words), len(words))
    num_samples = int(confusion.sum())
    if num_samples == 0:
        raise DataError("there is no sample to score: the labelled rows must number at least 1")
    right, totals = confusion.diagonal().tolist(), confusion.sum(1).tolist()
    recalls = {word: r / n if n else None for word, r, n in zip(words, right, totals, strict=True)}
    return Scores(sum(right) / num_samples, recalls, confusion.tolist(), num_samples)
