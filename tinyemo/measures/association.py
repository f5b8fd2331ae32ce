"""Association of label words with group words and with groups of images.

Before training: is a label word nearer to the words of one group than to those of another in the language model's
embedding table? After training: are the projected images of a label? Both are the single-target test of Caliskan et
al. (2017, arXiv 1608.07187, WEFAT), with p over the ways to part the group words. And do images of one group get a
higher score for a label than others, among images that show another label?

Shape letters: N images, C labels, H width, A and B words of two groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyemo.measures.discoveries import Finding
from tinyemo.measures.gaps import Bools, Floats, stratified_gap
from tinyemo.measures.groups import CANDIDATE_P, MIN_IMAGES, Adjustment, groups_of
from tinyemo.measures.scored import UNKNOWN, ScoredData

MAX_PARTITIONS = 20_000
"""Ways to part the words that are counted one by one; of more, this many are drawn."""


@dataclass(frozen=True)
class WordGroups:
    """Words of two groups, for instance women and men, with their unit vectors.

    Attributes:
        name: of the pair.
        first, second: names of the groups.
        first_vectors: (A, H).
        second_vectors: (B, H).
    """

    name: str
    first: str
    second: str
    first_vectors: Floats
    second_vectors: Floats


@dataclass(frozen=True)
class WordAssociation:
    """How much nearer targets are to the first group's words; all (C,).

    Attributes:
        difference: mean cosine with the first group's words less that with the second's.
        effect_size: the difference over the standard deviation of the cosines with all words (Cohen's d).
        error: standard error of the difference, from the spread of the words.
        p: two-sided, over the ways to part the words into groups of these sizes.
    """

    difference: Floats
    effect_size: Floats
    error: Floats
    p: Floats


def associate(targets: Floats, groups: WordGroups, *, seed: int = 0) -> WordAssociation:
    """Test whether each of C targets is nearer to the words of one group.

    Args:
        targets: (C, H); unit vectors of words, or means of unit vectors of images.
        groups: the words; unit vectors.
        seed: of the drawn partitions, where there are too many to count.
    """
    words = np.concatenate([groups.first_vectors, groups.second_vectors])
    num_first, num_words = len(groups.first_vectors), len(words)
    num_second = num_words - num_first
    cosines = targets @ words.T
    sums = cosines.sum(1, keepdims=True)
    parted = _partitions(num_words, num_first, seed)
    first = cosines @ parted.T / num_first
    statistics = first - (sums - first * num_first) / num_second
    difference = statistics[:, 0]  # the first partition is the given one
    is_as_large = np.abs(statistics) >= np.abs(difference[:, None]) - 1e-12
    spread = cosines.std(1, ddof=1)
    variance = cosines[:, :num_first].var(1, ddof=1) / num_first + cosines[:, num_first:].var(1, ddof=1) / num_second
    return WordAssociation(
        difference=difference,
        effect_size=np.divide(difference, spread, out=np.zeros_like(spread), where=spread > 0),
        error=np.sqrt(variance),
        p=is_as_large.mean(1),
    )


@lru_cache(maxsize=4)
def _partitions(num_words: int, num_first: int, seed: int) -> NDArray[np.float64]:
    """Return (P, A + B) zeros and ones, the given partition first: all of them, or MAX_PARTITIONS drawn at random."""
    if math.comb(num_words, num_first) <= MAX_PARTITIONS:
        chosen = np.array(list(combinations(range(num_words), num_first)))
    else:
        order = np.random.default_rng(seed).random((MAX_PARTITIONS, num_words)).argsort(1)
        chosen = np.concatenate([np.arange(num_words)[None], order])[:, :num_first]
    parted = np.zeros((len(chosen), num_words))
    np.put_along_axis(parted, chosen, 1.0, axis=1)
    return parted


def unit(vectors: NDArray[Any]) -> Floats:
    """Return the rows, each divided by its length."""
    vectors = np.asarray(vectors, np.float64)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-30))


def find_word_associations(
    data: str, labels: Sequence[str], label_vectors: Floats, image_means: Floats | None, groups: WordGroups
) -> list[Finding]:
    """Return a finding for each label in the embedding table and, with `image_means`, in the projector's space.

    Args:
        data: name of the data set whose images these are.
        labels: the C words.
        label_vectors: (C, H) in the table.
        image_means: (C, H) mean of the unit vectors of each label's projected images; a row of NaN where it has none.
            What all labels have in common is taken out: it ties no label.
        groups: words of two groups.
    """
    spaces = [("table", unit(label_vectors))]
    if image_means is not None:
        spaces.append(("images", image_means - np.nanmean(image_means, axis=0)))
    findings = []
    for space, targets in spaces:
        kept = np.flatnonzero(np.isfinite(targets).all(1))
        found = associate(targets[kept], groups)
        for row, place in enumerate(kept.tolist()):
            difference, error = float(found.difference[row]), float(found.error[row])
            nearer = groups.first if difference > 0 else groups.second
            subject = f"the word {labels[place]}" if space == "table" else f"images of {labels[place]}"
            title = (
                f"{subject} nearer to the words of {nearer} ({groups.first} less {groups.second}: {difference:+.4f}, "
                f"d {found.effect_size[row]:+.2f})"
            )
            findings.append(
                Finding(
                    part="association", title=title, data=data if space == "images" else "", group=groups.first,
                    other=groups.second, metric=f"{space}:{labels[place]}", effect=difference,
                    low=difference - 1.96 * error, high=difference + 1.96 * error, p=float(found.p[row]),
                    details={"effect_size": float(found.effect_size[row]), "words": groups.name},
                )
            )  # fmt: skip
    return findings


def find_score_ties(data: ScoredData, column: str) -> list[Finding]:
    """Test for each group and label whether the group's images get a higher score for a label that they do not show.

    A score is taken against the mean of all labels that an image does not show, so that a group whose images are only
    harder ties no label. The mix of true labels is held equal.

    Raises:
        DataError: see `groups_of`.
    """
    kept, _ = groups_of(data, column)
    is_known = data.groups[column].codes != UNKNOWN
    data = data if is_known.all() else data.take(is_known)
    codes, names, size = data.groups[column].codes, data.groups[column].names, len(data.labels)
    if size < 3:
        return []
    leans = _leans(data)
    findings, adjust = [], Adjustment(data, data.covariates)
    for label in range(size):
        lean = leans[:, label]
        for place in kept:
            inside = codes == place
            gaps = stratified_gap(lean, inside, data.label, size, data.clusters, without=label)
            if min(gaps.num_group[-1], gaps.num_other[-1]) < MIN_IMAGES:
                continue
            other = names[1 - place] if len(names) == 2 else "the rest"
            effect = float(gaps.effect[-1])
            title = (
                f"images of {column}={names[place]} that do not show {data.labels[label]} score {effect:+.4f} for it "
                f"against {other}"
            )
            finding = Finding(
                part="association", title=title, data=data.name, group=f"{column}={names[place]}", other=other,
                metric=f"score:{data.labels[label]}", effect=effect, low=float(gaps.low[-1]),
                high=float(gaps.high[-1]), p=float(gaps.p[-1]),
                num_images=int(gaps.num_group[-1] + gaps.num_other[-1]),
            )  # fmt: skip
            if finding.p <= CANDIDATE_P:
                rows = np.flatnonzero(data.label != label)
                finding = adjust.apply(finding, lean, inside, data.label, rows)
            findings.append(finding)
    return [
        tie for place in kept for tie in _without_echoes(data, findings, codes == place, f"{column}={names[place]}")
    ]


def _leans(data: ScoredData) -> Floats:
    """Return (N, C) the score of each label against the mean of all labels that an image does not show."""
    own = data.scores[np.arange(len(data)), data.label]
    others = (data.scores.sum(1) - own) / (len(data.labels) - 1)
    return np.asarray(data.scores - others[:, None], np.float64)


def _without_echoes(data: ScoredData, ties: Sequence[Finding], inside: Bools, group: str) -> list[Finding]:
    """Return the ties of one group; those that only follow from its strongest tie are marked as explained by it.

    Label words are not independent: images that are pulled to one word come nearer to its neighbours too.
    """
    own = [tie for tie in ties if tie.group == group]
    strongest = min(own, key=lambda tie: tie.p, default=None)
    if strongest is None or strongest.p > CANDIDATE_P:
        return own
    leader = strongest.metric.partition(":")[2]
    first = data.labels.index(leader)
    leans, found = _leans(data), []
    for tie in own:
        label = data.labels.index(tie.metric.partition(":")[2])
        if tie is strongest or tie.p > CANDIDATE_P or tie.explained_by is not None:
            found.append(tie)
            continue
        rows = np.flatnonzero((data.label != label) & (data.label != first))
        adjust = Adjustment(data, data.covariates | {f"the tie to {leader}": leans[:, first]})
        found.append(adjust.apply(tie, leans[:, label], inside, data.label, rows))
    return found
