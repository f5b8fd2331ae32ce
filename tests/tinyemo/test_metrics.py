"""Figures from a confusion matrix against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score
from sklearn.metrics import confusion_matrix as reference_matrix

from tinyemo.errors import DataError
from tinyemo.metrics import confusion_matrix, scores_from_confusion

WORDS = ("anger", "joy", "sadness", "awe")
pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


@given(pairs)
@settings(deadline=None)
def test_scores_are_those_of_scikit_learn(rows: list[tuple[int, int]]):
    targets, predictions = (torch.tensor(column) for column in zip(*rows, strict=True))
    matrix = confusion_matrix(targets, predictions, 4)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == reference_matrix(targets, predictions, labels=range(4)).tolist()
    scores = scores_from_confusion(matrix, WORDS)
    assert scores.top1_accuracy == pytest.approx(accuracy_score(targets, predictions))
    assert scores.num_samples == len(rows)
    recalls = recall_score(targets, predictions, labels=range(4), average=None, zero_division=0)
    for index, word in enumerate(WORDS):
        if index in targets.tolist():
            assert scores.per_class_recall[word] == pytest.approx(recalls[index])
        else:
            assert scores.per_class_recall[word] is None


@given(pairs, pairs)
@settings(deadline=None, max_examples=20)
def test_matrices_add_up_over_batches(first: list[tuple[int, int]], second: list[tuple[int, int]]):
    def matrix(rows: list[tuple[int, int]]) -> torch.Tensor:
        targets, predictions = (torch.tensor(column) for column in zip(*rows, strict=True))
        return confusion_matrix(targets, predictions, 4)

    assert torch.equal(matrix(first) + matrix(second), matrix(first + second))


def test_no_sample_is_an_error():
    with pytest.raises(DataError, match="no sample to score"):
        scores_from_confusion(torch.zeros(4, 4, dtype=torch.int64), WORDS)
