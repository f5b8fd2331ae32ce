"""Gaps in recall, precision, calibration and margin between the groups of a column, and between two data sets.

Each group is compared with all other images whose group is known. Recall is that of a label, or of all labels
together with the label mix held equal; calibration is confidence less accuracy; the margin is the score of the true
label less the highest of the others. What the covariates account for is taken out of gaps before a group is blamed
for them.

Shape letters: N images, G groups, C labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tinyemo.errors import DataError
from tinyemo.measures.discoveries import Finding, Part
from tinyemo.measures.gaps import Adjusted, Bools, Gaps, Ints, adjusted_gap, design_of, stratified_gap
from tinyemo.measures.scored import UNKNOWN, ScoredData

MIN_IMAGES = 20
"""Fewest images on each side of a comparison."""
CANDIDATE_P = 0.05


@dataclass(frozen=True)
class GroupTable:
    """Plain figures of each group of a column, as fairlearn's MetricFrame has them.

    Attributes:
        names: of the G groups.
        count: (G,) images.
        accuracy: (G,) share of right predictions.
        recall, precision: (G, C); NaN where the group has no such image or prediction.
        calibration: (G,) mean confidence less accuracy.
    """

    names: tuple[str, ...]
    count: Ints
    accuracy: NDArray[np.float64]
    recall: NDArray[np.float64]
    precision: NDArray[np.float64]
    calibration: NDArray[np.float64]


def group_table(data: ScoredData, column: str) -> GroupTable:
    """Return the figures of every group, from one count of (group, label, prediction)."""
    known = _known(data, column)
    codes, names = known.groups[column].codes, known.groups[column].names
    size = len(known.labels)
    cells = np.bincount((codes * size + known.label) * size + known.predicted, minlength=len(names) * size * size)
    confusion = cells.reshape(len(names), size, size).astype(np.float64)
    right = np.diagonal(confusion, axis1=1, axis2=2)
    count = confusion.sum((1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = right.sum(1) / count
        recall, precision = right / confusion.sum(2), right / confusion.sum(1)
        confidence = np.bincount(codes, known.confidence, len(names)) / count
    return GroupTable(names, count.astype(np.int64), accuracy, recall, precision, confidence - accuracy)


def groups_of(data: ScoredData, column: str) -> tuple[list[int], list[str]]:
    """Return the groups that can be compared, and a line about each that is too small.

    Raises:
        DataError: no group and its rest have MIN_IMAGES images.
    """
    codes, names = data.groups[column].codes, data.groups[column].names
    count = np.bincount(codes[codes != UNKNOWN], minlength=len(names))
    rest = count.sum() - count
    kept = np.flatnonzero((count >= MIN_IMAGES) & (rest >= MIN_IMAGES)).tolist()
    small = [f"{column}={names[place]} has {count[place]} images" for place in range(len(names)) if place not in kept]
    if not kept:
        raise DataError(
            f"{data.name}: no group of {column!r} has {MIN_IMAGES} images and {MIN_IMAGES} others to compare with "
            f"({'; '.join(small[:3]) or 'no image has a group'}): give larger groups or more images"
        )
    # Of two groups, one says all.
    return kept[: 1 if len(names) == 2 else None], small


def find_gaps(data: ScoredData, column: str) -> list[Finding]:
    """Test each group of a column against the rest.

    Raises:
        DataError: see `groups_of`.
    """
    kept, _ = groups_of(data, column)
    known = _known(data, column)
    codes, names = known.groups[column].codes, known.groups[column].names
    others = {place: names[1 - place] if len(names) == 2 else "the rest" for place in kept}
    adjust = Adjustment(known, known.covariates)
    return [
        finding
        for place in kept
        for finding in _compare(known, codes == place, f"{column}={names[place]}", others[place], "groups", adjust)
    ]


def compare_sets(first: ScoredData, second: ScoredData) -> list[Finding]:
    """Test the first data set against the second, on the labels that both hold.

    Raises:
        DataError: they share fewer than two labels.
    """
    shared = [word for word in first.labels if word in second.labels]
    if len(shared) < 2:
        raise DataError(f"{first.name} and {second.name} share {len(shared)} labels; the gap between them needs 2")
    parts = [_of_labels(data, shared) for data in (first, second)]
    covariates = {
        name: np.concatenate([part.covariates[name] for part in parts])
        for name in first.covariates
        if name in second.covariates
    }
    clusters = None
    if any(part.clusters is not None for part in parts):
        numbers = [np.arange(len(part)) if part.clusters is None else part.clusters for part in parts]
        clusters = np.concatenate([numbers[0], numbers[1] + numbers[0].max() + 1])
    both = ScoredData(
        name=f"{first.name} and {second.name}",
        labels=tuple(shared),
        label=np.concatenate([part.label for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
        confidence=np.concatenate([part.confidence for part in parts]),
        covariates=covariates,
        clusters=clusters,
    )
    in_first = np.arange(len(both)) < len(parts[0])
    return list(_compare(both, in_first, first.name, second.name, "sets", Adjustment(both, covariates)))


def compare_all_sets(sets: Sequence[ScoredData]) -> list[Finding]:
    """Test each pair of data sets that share at least two labels."""
    pairs = [(a, b) for a, b in combinations(sets, 2) if len(set(a.labels) & set(b.labels)) > 1]
    return [finding for first, second in pairs for finding in compare_sets(first, second)]


def _known(data: ScoredData, column: str) -> ScoredData:
    is_known = data.groups[column].codes != UNKNOWN
    return data if is_known.all() else data.take(is_known)


def _of_labels(data: ScoredData, shared: Sequence[str]) -> ScoredData:
    """Return the images of some labels, told apart among these alone."""
    places = np.array([data.labels.index(word) for word in shared])
    position = np.full(len(data.labels), UNKNOWN)
    position[places] = np.arange(len(shared))
    kept = data.take(position[data.label] != UNKNOWN)
    return replace(kept, labels=tuple(shared), label=position[kept.label], scores=kept.scores[:, places])


class Adjustment:
    """Takes known covariates, one by one and all together, out of a gap."""

    def __init__(self, data: ScoredData, covariates: dict[str, NDArray[Any]]) -> None:
        self.data = data
        self.names = list(covariates)
        # Integers are codes of groups; UNKNOWN is a group of its own.
        self.parts = {
            name: _indicators_of(values) if values.dtype.kind == "i" else design_of([], {name: values})
            for name, values in covariates.items()
        }

    def apply(self, finding: Finding, outcome: NDArray[Any], in_group: Bools, strata: Ints, rows: Ints) -> Finding:
        """Return the finding with its adjusted effect and what explains it.

        Args:
            finding: with the raw effect.
            outcome, in_group, strata: (N,) of all images.
            rows: the images that the effect was measured on.
        """
        if not self.names:
            return finding
        clusters = None if self.data.clusters is None else self.data.clusters[rows]
        by_stratum = design_of([np.unique(strata[rows], return_inverse=True)[1]])

        def left_after(names: Sequence[str]) -> Adjusted:
            design = sparse.hstack([by_stratum, *(self.parts[name][rows] for name in names)], format="csr")
            return adjusted_gap(outcome[rows], in_group[rows], design, clusters)

        whole = left_after(self.names)
        explained_by = None
        if is_explained(finding.effect, whole.effect, whole.p):
            alone = [
                name for name in self.names if is_explained(finding.effect, (left := left_after([name])).effect, left.p)
            ]
            explained_by = ", ".join(alone or self.names)
        return replace(finding, adjusted_effect=whole.effect, adjusted_p=whole.p, explained_by=explained_by)


def _indicators_of(codes: Ints) -> sparse.csr_matrix:
    return design_of([codes - min(int(codes.min()), 0)])


def is_explained(raw: float, left: float, p: float) -> bool:
    """Return whether covariates take at least half of an effect away, and a fifth is left or what is left may be
    chance.

    Args:
        raw: the effect.
        left: what is left of it.
        p: of the test that nothing is left.
    """
    share = abs(left) / abs(raw) if raw else 1.0
    return share <= 0.2 or (share <= 0.5 and p > CANDIDATE_P)


def _compare(
    data: ScoredData, in_group: Bools, group: str, other: str, part: Part, adjust: Adjustment
) -> Iterator[Finding]:
    """Yield the findings of one comparison: of each label, and of all labels."""
    size, predicted, is_right = len(data.labels), data.predicted, data.is_right
    own = data.scores[np.arange(len(data)), data.label]
    rivals = data.scores.copy()
    rivals[np.arange(len(data)), data.label] = -np.inf
    measures: list[tuple[str, NDArray[Any], Ints, bool]] = [
        ("recall", is_right, data.label, True),
        ("precision", is_right, predicted, True),
        ("calibration", data.confidence - is_right, data.label, False),
        ("margin", own - rivals.max(1), data.label, False),
    ]
    for metric, outcome, strata, by_label in measures:
        gaps = stratified_gap(outcome, in_group, strata, size, data.clusters)
        places = [*(range(size) if by_label else ()), *(() if metric == "precision" else (size,))]
        for place in places:
            if min(gaps.num_group[place], gaps.num_other[place]) < MIN_IMAGES or not gaps.p[place] >= 0:
                continue
            name = metric if place == size else f"{metric}:{data.labels[place]}"
            finding = gap_finding(gaps, place, part, data.name, group, other, name)
            if finding.p <= CANDIDATE_P:
                rows = np.arange(len(data)) if place == size else np.flatnonzero(strata == place)
                finding = adjust.apply(finding, outcome, in_group, strata, rows)
            yield finding


def gap_finding(gaps: Gaps, place: int, part: Part, data: str, group: str, other: str, metric: str) -> Finding:
    """Return the gap at one place as a finding."""
    name, _, label = metric.partition(":")
    subject = f"{name} of {label}" if label else name
    mean_group, mean_other = float(gaps.mean_group[place]), float(gaps.mean_other[place])
    num_group, num_other = int(gaps.num_group[place]), int(gaps.num_other[place])
    title = (
        f"{subject} is {mean_group:.3f} in {group} ({num_group} images) and {mean_other:.3f} in {other} "
        f"({num_other}): {float(gaps.effect[place]):+.3f}"
    )
    return Finding(
        part=part, title=title, data=data, group=group, other=other, metric=metric,
        effect=float(gaps.effect[place]), low=float(gaps.low[place]), high=float(gaps.high[place]),
        p=float(gaps.p[place]), error=float(gaps.error[place]), num_images=num_group + num_other,
        details={"mean_group": mean_group, "mean_other": mean_other},
    )  # fmt: skip
