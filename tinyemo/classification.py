"""Evaluation of a trained projector on labelled rows, and its labels and scores for any rows and words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tinyemo.errors import DataError
from tinyemo.features import FeatureTable
from tinyemo.metrics import Scores, confusion_matrix, scores_from_confusion
from tinyemo.projector import MetricProjector
from tinyemo.taxonomies import canonical_word

ROWS_PER_FORWARD = 4096


def evaluate_projector(projector: MetricProjector, table: FeatureTable, words: Sequence[str]) -> Scores:
    """Compute accuracy, recalls and the confusion matrix over every row of the table.

    Raises:
        DataError: the table has no labels, a label is not among the words, a word has no embedding, or widths differ.
    """
    words = _canonical(words)
    if table.labels is None:
        raise DataError("the features have no column 'emotion' or 'label' to evaluate against")
    place = {word: index for index, word in enumerate(words)}
    spelled = [canonical_word(label) for label in table.labels]
    unknown = sorted(set(spelled) - set(place))
    if unknown:
        raise DataError(
            f"{sum(label not in place for label in spelled)} of {len(spelled)} rows have labels that are not among the "
            f"words ({', '.join(unknown[:5])}): choose a taxonomy or words that hold them"
        )
    targets = torch.tensor([place[label] for label in spelled])
    predictions = torch.cat([scores.argmax(dim=1) for scores in _scores(projector, table, words)])
    return scores_from_confusion(confusion_matrix(targets, predictions, len(words)), words)


@dataclass(frozen=True)
class ZeroShotScores:
    """Scores on labels that were left out of training, and on the other labels."""

    seen: Scores | None
    """Rows of the other labels, told apart among those; None where there are none."""
    zero_shot: Scores
    """Rows of the labels left out, told apart among those."""
    among_all: float
    """Share of the rows of the labels left out whose own label is the nearest of all words, in [0, 1]."""
    chance: float
    """Accuracy of guessing on `zero_shot`, in [0, 1]."""


def evaluate_left_out(
    projector: MetricProjector, table: FeatureTable, words: Sequence[str], left_out: Sequence[str]
) -> ZeroShotScores:
    """Compute the accuracy on labels that the projector was not trained on, even where it is at chance.

    Args:
        projector: trained without `left_out`.
        table: labelled rows of both kinds.
        words: all labels.
        left_out: at least two of them.

    Raises:
        DataError: see `evaluate_projector`; or fewer than two labels are left out, or no row has one.
    """
    words, left_out = _canonical(words), _canonical(left_out)
    foreign = [word for word in left_out if word not in words]
    if foreign or len(left_out) < 2:
        raise DataError(
            f"labels left out must be at least 2 of {', '.join(words)} (one alone is always right); "
            f"got {', '.join(left_out)}"
        )
    both = evaluate_projector(projector, table, words)
    rows_of_word, place = torch.tensor(both.confusion), {word: index for index, word in enumerate(words)}
    places = [place[word] for word in left_out]
    num_rows = int(rows_of_word[places].sum())
    if num_rows == 0:
        raise DataError(f"no row has one of the labels left out ({', '.join(left_out)})")
    seen = tuple(word for word in words if word not in left_out)
    seen_table = _rows_of(table, seen)
    return ZeroShotScores(
        seen=evaluate_projector(projector, seen_table, seen) if seen_table.ids else None,
        zero_shot=evaluate_projector(projector, _rows_of(table, left_out), left_out),
        among_all=int(rows_of_word.diagonal()[places].sum()) / num_rows,
        chance=1 / len(left_out),
    )


def _rows_of(table: FeatureTable, words: Sequence[str]) -> FeatureTable:
    assert table.labels is not None
    kept = [row for row, label in enumerate(table.labels) if canonical_word(label) in words]
    return replace(
        table,
        ids=[table.ids[row] for row in kept],
        labels=[table.labels[row] for row in kept],
        features=table.features[kept],
    )


def predict_labels(projector: MetricProjector, table: FeatureTable, words: Sequence[str]) -> list[dict[str, Any]]:
    """Return each row's `id`, its nearest word as `label`, and `scores`: the cosine of each word, highest first.

    Raises:
        DataError: a word has no embedding, or widths differ.
    """
    words = _canonical(words)
    rows: list[dict[str, Any]] = []
    for scores in _scores(projector, table, words):
        values, order = scores.sort(dim=1, descending=True, stable=True)
        for row_values, row_order in zip(values.tolist(), order.tolist(), strict=True):
            ranked = {words[index]: value for index, value in zip(row_order, row_values, strict=True)}
            rows.append({"id": table.ids[len(rows)], "label": words[row_order[0]], "scores": ranked})
    return rows


def _canonical(words: Sequence[str]) -> tuple[str, ...]:
    spelled = tuple(dict.fromkeys(canonical_word(word) for word in words))
    if not spelled or "" in spelled:
        raise DataError("there must be at least one word to choose from, and none may be empty")
    return spelled


def _scores(projector: MetricProjector, table: FeatureTable, words: Sequence[str]) -> Iterator[Tensor]:
    """Yield (B, C) cosines, a few thousand rows at a time."""
    for features in table.features.split(ROWS_PER_FORWARD):  # type: ignore[no-untyped-call]
        yield projector.classify(features, words)
