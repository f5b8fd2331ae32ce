"""Scored images of one data set, with what is known about each: the input of every part of a bias report.

Shape letters: N images, C labels, H width of the embedding space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyemo.measures.gaps import Bools, Floats, Ints

UNKNOWN = -1


@dataclass(frozen=True)
class Column:
    """A column of groups: a number for each image, UNKNOWN where it has none, and the groups' names."""

    codes: Ints
    names: tuple[str, ...]

    @classmethod
    def of(cls, values: Sequence[Any] | NDArray[Any]) -> Column:
        """Return the column of (N,) names; None, NaN and the empty string are unknown."""
        import pandas as pd

        texts = pd.Series(values).astype("string")
        codes, names = pd.factorize(texts.where(texts != ""), sort=True)
        return cls(np.asarray(codes, np.int64), tuple(map(str, names)))


@dataclass(frozen=True)
class ScoredData:
    """N images with their labels and scores.

    Attributes:
        name: of the data set.
        labels: the C words.
        label: (N,) true label in [0, C).
        scores: (N, C) float32 cosines.
        confidence: (N,) chance that the model gives its own choice, in [0, 1].
        groups: columns of groups, by name.
        covariates: (N,) numbers by name, such as brightness, that may account for a gap.
        clusters: (N,) number of what is not independent, such as the author; None where images are.
        embeds: (N, H) or narrower, float; features or projected images, for slices; None to leave slices out.
    """

    name: str
    labels: tuple[str, ...]
    label: Ints
    scores: NDArray[np.float32]
    confidence: Floats
    groups: dict[str, Column] = field(default_factory=dict)
    covariates: dict[str, Floats] = field(default_factory=dict)
    clusters: Ints | None = None
    embeds: NDArray[Any] | None = None

    def __len__(self) -> int:
        return len(self.label)

    @property
    def predicted(self) -> Ints:
        """(N,) label with the highest score."""
        return np.asarray(self.scores.argmax(1), np.int64)

    @property
    def is_right(self) -> Bools:
        """(N,) whether the prediction is the true label."""
        return np.asarray(self.predicted == self.label)

    def take(self, rows: Ints | Bools) -> ScoredData:
        """Return some of the images."""
        return ScoredData(
            name=self.name,
            labels=self.labels,
            label=self.label[rows],
            scores=self.scores[rows],
            confidence=self.confidence[rows],
            groups={name: Column(column.codes[rows], column.names) for name, column in self.groups.items()},
            covariates={name: values[rows] for name, values in self.covariates.items()},
            clusters=None if self.clusters is None else self.clusters[rows],
            embeds=None if self.embeds is None else self.embeds[rows],
        )
