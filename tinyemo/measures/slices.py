"""Slices that nobody named: regions of the feature space with lower recall, found on one half and confirmed on the
other.

What the labels explain of the features is taken out first (the means of the labels, and the directions that these
span), so that a slice is not just the border between two labels. k-means of several sizes cuts the first half; the
clusters with the lowest recall are candidates, and are tested on the second half, which played no part in finding
them.

Shape letters: N images, d width, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinyemo.measures.discoveries import Finding
from tinyemo.measures.gaps import Bools, Ints, stratified_gap
from tinyemo.measures.groups import CANDIDATE_P, MIN_IMAGES, Adjustment, gap_finding
from tinyemo.measures.scored import UNKNOWN, ScoredData

NUM_CLUSTERS = (2, 4, 8, 16)
NUM_DIRECTIONS = 16
MAX_FIT = 20_000
"""Images that directions and clusters are fitted on."""
MAX_CANDIDATES = 5


@dataclass(frozen=True)
class Slice:
    """A confirmed or tested slice: its finding, and the images of both halves that lie in it."""

    finding: Finding
    rows: Ints


def find_slices(data: ScoredData, *, seed: int = 0) -> list[Slice]:
    """Return the candidates of the first half, tested on the second; none where there are too few images.

    A slice that coincides with known groups or covariates is marked as explained by them.
    """
    assert data.embeds is not None
    rng = np.random.default_rng(seed)
    first = _half(data, rng)
    if min(first.sum(), (~first).sum()) < 2 * MIN_IMAGES:
        return []
    assigned = _clusters(data, first, rng)
    second = np.flatnonzero(~first)
    rest = data.take(second)
    known: dict[str, NDArray[Any]] = {
        **rest.covariates,
        **{name: column.codes for name, column in rest.groups.items()},
    }
    adjust = Adjustment(rest, known)
    found = []
    for number, members in enumerate(_candidates(data, first, assigned)):
        inside = members[second]
        gaps = stratified_gap(rest.is_right, inside, rest.label, len(rest.labels), rest.clusters)
        if min(gaps.num_group[-1], gaps.num_other[-1]) < MIN_IMAGES:
            continue
        finding = gap_finding(gaps, -1, "slices", data.name, f"slice {number + 1}", "the rest", "recall")
        if finding.p <= CANDIDATE_P:
            finding = adjust.apply(finding, rest.is_right, inside, rest.label, np.arange(len(rest)))
        found.append(
            Slice(replace(finding, details=finding.details | describe(data, members)), np.flatnonzero(members))
        )
    return found


def describe(data: ScoredData, members: Bools) -> dict[str, Any]:
    """Return what a slice's images have in common: its labels, groups and covariates against those of all images."""
    count = np.bincount(data.label[members], minlength=len(data.labels))
    document: dict[str, Any] = {
        "labels": {word: int(number) for word, number in zip(data.labels, count, strict=True) if number},
        "covariates": {
            name: {"slice": float(np.nanmean(values[members])), "all": float(np.nanmean(values))}
            for name, values in data.covariates.items()
        },
        "groups": {},
    }
    for name, column in data.groups.items():
        inside = np.bincount(column.codes[members & (column.codes != UNKNOWN)], minlength=len(column.names))
        everywhere = np.bincount(column.codes[column.codes != UNKNOWN], minlength=len(column.names))
        if inside.sum() and everywhere.sum():
            lift = inside / inside.sum() - everywhere / everywhere.sum()
            top = int(lift.argmax())
            document["groups"][name] = {
                "most_over": column.names[top],
                "share": float(inside[top] / inside.sum()),
                "share_of_all": float(everywhere[top] / everywhere.sum()),
            }
    return document


def _half(data: ScoredData, rng: np.random.Generator) -> Bools:
    """Return which images are in the first half; a cluster of images is never parted."""
    if data.clusters is None:
        return rng.random(len(data)) < 0.5
    return np.asarray(rng.random(int(data.clusters.max()) + 1) < 0.5)[data.clusters]


def _clusters(data: ScoredData, first: Bools, rng: np.random.Generator) -> list[Ints]:
    """Return the cluster of every image for each of NUM_CLUSTERS, fitted on the first half."""
    from sklearn.cluster import KMeans

    assert data.embeds is not None
    fit = np.flatnonzero(first)
    fit = rng.permutation(fit)[:MAX_FIT]
    sample = data.embeds[fit].astype(np.float64)
    label = data.label[fit]
    counts = np.maximum(np.bincount(label, minlength=len(data.labels)), 1)
    means = np.stack([np.bincount(label, column, len(data.labels)) for column in sample.T], axis=1) / counts[:, None]
    grand = sample.mean(0)
    present = np.bincount(label, minlength=len(data.labels)) > 0
    _, strength, spanned = np.linalg.svd(means[present] - grand, full_matrices=False)
    spanned = spanned[strength > 1e-8 * max(strength.max(), 1e-300)]
    rest = sample - means[label]
    rest = rest - rest @ spanned.T @ spanned
    _, _, directions = np.linalg.svd(rest.T @ rest)
    directions = directions[:NUM_DIRECTIONS]
    places = np.concatenate(
        [_coordinates(part, grand, spanned, directions) for part in np.array_split(data.embeds, len(data) // 8192 + 1)]
    )
    start = int(rng.integers(2**31))
    return [
        KMeans(size, n_init=3, random_state=start).fit(places[fit]).predict(places).astype(np.int64)
        for size in NUM_CLUSTERS
        if len(fit) >= size * MIN_IMAGES
    ]


def _coordinates(
    part: NDArray[Any], grand: NDArray[Any], spanned: NDArray[Any], directions: NDArray[Any]
) -> NDArray[np.float32]:
    centred = part - grand
    return np.asarray((centred - centred @ spanned.T @ spanned) @ directions.T, np.float32)


def _candidates(data: ScoredData, first: Bools, assigned: Sequence[Ints]) -> list[Bools]:
    """Return the members of the clusters with the lowest recall on the first half, without those that overlap."""
    half = np.flatnonzero(first)
    is_right, label = data.is_right[half], data.label[half]
    clusters = None if data.clusters is None else data.clusters[half]
    ranked = []
    for codes in assigned:
        for cluster in range(int(codes.max()) + 1):
            inside = codes[half] == cluster
            if min(inside.sum(), (~inside).sum()) < MIN_IMAGES:
                continue
            gaps = stratified_gap(is_right, inside, label, len(data.labels), clusters)
            if gaps.effect[-1] < 0 and gaps.p[-1] <= CANDIDATE_P:
                ranked.append((float(gaps.p[-1]), float(gaps.effect[-1]), codes == cluster))
    chosen: list[Bools] = []
    for _, _, members in sorted(ranked, key=lambda row: row[:2]):
        if all((members & other).sum() <= 0.5 * min(members.sum(), other.sum()) for other in chosen):
            chosen.append(members)
        if len(chosen) == MAX_CANDIDATES:
            break
    return chosen
